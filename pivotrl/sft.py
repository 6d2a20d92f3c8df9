"""Supervised fine-tuning on expert turns and a mixture of unrelated skills: the warm-up that makes pi_0 partly able."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from pivotrl import preemption, watchdog
from pivotrl.batching import Item, pack
from pivotrl.candidates import load_tools, tools_key
from pivotrl.config import Config
from pivotrl.evaluation import skills
from pivotrl.export import copy_tokenizer
from pivotrl.local_rollouts import seed_of
from pivotrl.loss import sft_loss
from pivotrl.megatron import checkpoint
from pivotrl.megatron.policy import Policy
from pivotrl.metrics import MetricsLog, peak_rss_gib, progress
from pivotrl.records import read_jsonl
from pivotrl.render import Renderer
from pivotrl.tokenizer import compact_text, train_tokenizer
from pivotrl.types import Action, Message, Trajectory

SKILL_EXAMPLES = 20_000  # distinct training examples over all families


def load_trajectories(config: Config) -> list[Trajectory]:
    """The trajectories of the split that config.sft names.

    Raises:
        ValueError: there are none.
    """
    path = Path(config.candidates_path) / "trajectories.jsonl"
    chosen = [t for t in read_jsonl(path, Trajectory) if t.split == config.sft.split]
    if not chosen:
        raise ValueError(f"{path} holds no {config.sft.split!r} trajectories; set domain.num_warmup_tasks, or sft.split=train")
    return chosen


def prepare_tokenizer(config: Config, folder: Path) -> None:
    """Put the policy's tokenizer into `folder`: trained on the training text, or that of model.hf_path.

    Raises:
        ValueError: neither is configured, or both.
    """
    if (folder / "tokenizer.json").exists():
        return
    if config.sft.train_tokenizer and config.model.hf_path:
        raise ValueError(f"sft.train_tokenizer=true with model.hf_path={config.model.hf_path}, which has a tokenizer: set one of them")
    if config.sft.train_tokenizer:
        path = Path(config.candidates_path) / "trajectories.jsonl"
        texts = [compact_text(t.messages) for t in read_jsonl(path, Trajectory) if t.split in ("warmup", "train")]
        texts += [compact_text(messages) for messages in skill_messages(config.seed)]
        partial = folder.with_name("tokenizer.tmp")
        train_tokenizer(texts, config.model.vocab_size).save_pretrained(partial)
        partial.rename(folder)
    elif config.model.hf_path:
        folder.mkdir(parents=True, exist_ok=True)
        copy_tokenizer(Path(config.model.hf_path), folder)
    else:
        raise ValueError(
            "no tokenizer: set model.hf_path to a Hugging Face folder, or sft.train_tokenizer=true to train one for a new model"
        )


def skill_messages(seed: int) -> list[tuple[Message, ...]]:
    """Conversations (question, answer) of every skill family, training split only."""
    per_family = SKILL_EXAMPLES // len(skills.FAMILIES)
    examples = [e for family in skills.FAMILIES for e in skills.generate(family, per_family, seed=seed, split="train")]
    return [tuple(skills.to_messages(example)) for example in examples]


def conversation_items(renderer: Renderer, messages: Sequence[Message], tools: Sequence[dict]) -> list[Item]:
    """One item per assistant turn, its completion scored; packing folds turns whose histories grow into one segment."""
    items = []
    for index, message in enumerate(messages):
        if message.role == "assistant" and index > 0:
            prompt = renderer.prompt(messages[:index], tools)
            action = renderer.action_ids(Action.from_message(message), messages[:index], tools)
            items.append(Item([*prompt, *action], range(len(prompt), len(prompt) + len(action))))
    return items


def _shuffled(conversations: Sequence[tuple], render: Callable[..., list[Item]], seed: int) -> Iterator[list[Item]]:
    """Epoch after epoch in an order of its own; a conversation is rendered when it is first drawn."""
    rendered: dict[int, list[Item]] = {}
    for epoch in itertools.count():
        order = list(range(len(conversations)))
        random.Random(seed_of(seed, epoch)).shuffle(order)
        for index in order:
            if index not in rendered:
                rendered[index] = render(*conversations[index])
            yield rendered[index]


def _length(unit: list[Item]) -> int:
    return max(len(item.token_ids) for item in unit)


def batches(config: Config, renderer: Renderer) -> Iterator[list[Item]]:
    """Endless steps of about sft.tokens_per_step tokens, of which sft.skill_share are skills; only the seed decides them."""
    sft, tools = config.sft, load_tools(Path(config.candidates_path))
    render = partial(conversation_items, renderer)
    expert = [(t.messages, tools[tools_key(t.tools)]) for t in load_trajectories(config)]
    streams = [(_shuffled(expert, render, seed_of(config.seed, "expert")), 1 - sft.skill_share)]
    if sft.skill_share > 0:
        skill = [(messages, ()) for messages in skill_messages(config.seed)]
        streams.append((_shuffled(skill, render, seed_of(config.seed, "skill")), sft.skill_share))
    while True:
        items: list[Item] = []
        for stream, share in streams:
            tokens = 0
            while tokens < sft.tokens_per_step * share:
                unit = next(stream)
                tokens += _length(unit)
                name = str(len(items))  # a unit of its own each time: one trajectory may come twice in a step
                items += [Item(item.token_ids, item.scored, unit=name) for item in unit]
        total = sum(len(item.scored) for item in items)
        for item in items:
            item.fields = {"weights": [1 / total] * len(item.scored)}
        yield items


def train(config: Config, policy: Policy, renderer: Renderer, log: MetricsLog | None, start: int) -> None:
    """Steps `start` to sft.num_steps; every process of the layout runs it on the same data.

    Raises:
        Preempted: a process was asked to leave; the step in flight is finished and saved.
    """
    stream = batches(config, renderer)
    for _ in range(start):
        next(stream)
    folder = Path(config.run_dir) / "checkpoints" / "sft"
    steps = range(start, config.sft.num_steps)
    with checkpoint.Saver(policy, folder, config.checkpoint) as saver:
        for step in progress(steps, desc="sft") if log is not None else steps:
            saver.check()
            watchdog.beat(f"step {step}")
            rows = pack(next(stream), max_row_tokens=config.batching.max_row_tokens, shared_prefix=config.batching.shared_prefix)
            metrics = policy.train_step(rows, sft_loss, temperature=1.0, step=step)
            if log is not None:
                tokens = sum(len(row.token_ids_T) for row in rows)
                seconds = metrics["forward_backward_s"] + metrics["optimizer_s"]
                log.log(step, {**metrics, "train_tokens": tokens, "train_tokens_per_s": tokens / seconds, "peak_rss_gib": peak_rss_gib()})
            leaving = preemption.agreed() and step + 1 < config.sft.num_steps
            if leaving or (step + 1) % config.sft.checkpoint_every == 0 or step + 1 == config.sft.num_steps:
                saver.save(step + 1, score=-metrics["loss"])
            if leaving:
                break
        else:
            return
    raise preemption.Preempted(f"{step + 1} of {config.sft.num_steps} steps are done and saved")
