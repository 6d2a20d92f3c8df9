"""TRL's GRPO optimizer step on one prompt of P tokens and G given completions of R tokens: the other side of shared_prefix.py.

    uv venv --python 3.12 trlenv && uv pip install --python trlenv/bin/python trl "torch==2.13.0" transformers
    OMP_NUM_THREADS=1 trlenv/bin/python tools/benchmarks/trl_step.py --json out.json [--cases 256,32,8 1024,64,16] [--batch-size 4]

TRL lives in an environment of its own, so nothing of this package is imported. GRPOTrainer runs its own training loop on prepared
completions: the clock covers forward, loss, backward, clipping and optimizer, neither generation nor rewards. The best of
`--repeats` steps after one warm-up step counts. Like the policy it is compared with, it has no dropout, no load-balancing loss,
no reference model (beta 0), no gradient checkpointing and runs in fp32.
"""

import argparse
import json
import math
import tempfile
import time
from typing import Any

import cases
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class GivenCompletions(GRPOTrainer):
    """GRPOTrainer that trains on `given` (what its generation would have returned) instead of generating."""

    given: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        assert len(inputs) == len(self.given["advantages"]), "one generation batch must be the one group"
        return dict(self.given)


class Clock(TrainerCallback):
    """Seconds of every optimizer step, all its micro-batches included; logging comes after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now() - self.began)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = cases.parser(__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--batch-size", type=int, help="completions per micro-batch, a divisor of every G (default: G)")
    args = parser.parse_args()
    for _, _, group in args.cases:
        if args.repeats < 1 or group < 2 or group % (args.batch_size or group):
            got = f"--repeats {args.repeats}, G {group}, --batch-size {args.batch_size}"
            raise ValueError(f"needed: --repeats >= 1, G >= 2 and a --batch-size that divides every G; got {got}")
    torch.set_num_threads(args.threads)
    results = []
    for case in args.cases:
        seconds = timed_steps(args, case)
        versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        results.append(dict(zip("PRG", case, strict=True)) | {"trl_s": round(min(seconds), 4)} | versions)
        print(json.dumps(results[-1]), "all steps:", [round(second, 4) for second in seconds], flush=True)
    args.json.write_text(json.dumps(results, indent=2) + "\n")


def timed_steps(args: argparse.Namespace, case: tuple[int, int, int]) -> list[float]:
    """Seconds of each optimizer step after the warm-up step.

    Raises:
        RuntimeError: a step did not train: a loss or gradient is not finite, or a parameter tensor stayed as it was.
    """
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, case, clock, folder)
        trainer.given = completions(args, case, trainer.accelerator.device)
        before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    finite = all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in logs)
    moves = all(entry["grad_norm"] > 0 for entry in logs)
    stuck = [name for name, param in trainer.model.named_parameters() if torch.equal(param, before[name])]
    if len(logs) != args.repeats + 1 or len(clock.seconds) != len(logs) or not finite or not moves or stuck:
        raise RuntimeError(f"case {case} did not train: unchanged parameters {stuck}, logs {logs}")
    return clock.seconds[1:]


def make_trainer(args: argparse.Namespace, case: tuple[int, int, int], clock: Clock, folder: str) -> GivenCompletions:
    prompt_length, reply, group = case
    batch = args.batch_size or group
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=group // batch,
        num_generations=group,
        max_completion_length=reply,
        max_steps=args.repeats + 1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        beta=0.0,
        temperature=1.0,
        router_aux_loss_coef=0.0,
        use_vllm=False,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = GivenCompletions(
        model=make_model(args, max_positions=prompt_length + reply),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),  # demanded, never called
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["0"] * (args.repeats + 1)}),  # one group per step, its text unused
        processing_class=make_tokenizer(args.vocab),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_model(args: argparse.Namespace, *, max_positions: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        moe_intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.groups,
        head_dim=args.hidden // args.heads,
        num_experts=args.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).float()


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of numbers: GRPOTrainer wants one, training on token ids never calls it."""
    words = Tokenizer(models.WordLevel({str(token): token for token in range(vocab)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1", pad_token="2", padding_side="left")


def completions(args: argparse.Namespace, case: tuple[int, int, int], device: torch.device) -> dict[str, torch.Tensor]:
    """The group as GRPOTrainer's generation returns it: the prompt repeated G times, random replies, advantages +1 and -1."""
    prompt_length, reply, group = case
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, args.vocab, (prompt_length,), generator=generator)
    replies = torch.randint(0, args.vocab, (group, reply), generator=generator)
    batch = {
        "prompt_ids": prompt.expand(group, -1).contiguous(),
        "prompt_mask": torch.ones(group, prompt_length, dtype=torch.long),
        "completion_ids": replies,
        "completion_mask": torch.ones_like(replies),
        "advantages": torch.ones(group).where(torch.arange(group) % 2 == 0, -1.0),
        "num_items_in_batch": torch.tensor(group * reply),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


if __name__ == "__main__":
    main()
