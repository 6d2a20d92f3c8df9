"""Tiny policies in every layout, their transformers twins and random rows. Under torchrun it measures layouts and writes JSON:

torchrun --nproc-per-node 2 tests/megatron/layouts.py FOLDER tp2 pp2
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from pivotrl.batching import Item, Row, pack  # noqa: E402
from pivotrl.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig  # noqa: E402
from pivotrl.export import hf_config  # noqa: E402
from pivotrl.loss import sft_loss  # noqa: E402
from pivotrl.megatron import checkpoint, hf_mapping, parallel  # noqa: E402
from pivotrl.megatron.policy import Policy  # noqa: E402

_SHAPE = {"vocab_size": 256, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16, "max_positions": 512}
MODELS = {
    "moe": ModelConfig(name="moe", **_SHAPE, num_layers=4, ffn_hidden_size=128, num_experts=8, experts_per_token=2, moe_ffn_hidden_size=32),
    "dense": ModelConfig(name="dense", **_SHAPE, num_layers=2, ffn_hidden_size=128, tie_embeddings=True),
}
# eps keeps Adam from turning rounding noise of tiny gradients into whole steps; the decay is large enough to be seen if it is wrong
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=1.0, eps=1e-6)


class Layout(NamedTuple):
    processes: int
    model: str
    parallel: ParallelConfig


_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "single": Layout(1, "moe", ParallelConfig()),
    "dense-single": Layout(1, "dense", ParallelConfig()),
    "dp2": Layout(2, "moe", ParallelConfig()),
    "dp2-overlap": Layout(2, "moe", ParallelConfig(**_OVERLAP)),
    "tp2": Layout(2, "moe", ParallelConfig(tensor=2)),
    "tp2-etp2": Layout(2, "moe", ParallelConfig(tensor=2, expert_tensor=2)),
    "tp2-ep2": Layout(2, "moe", ParallelConfig(tensor=2, expert=2)),
    "ep2": Layout(2, "moe", ParallelConfig(expert=2)),
    "pp2": Layout(2, "moe", ParallelConfig(pipeline=2)),
    "pp2-vpp2": Layout(2, "moe", ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "dense-tp2": Layout(2, "dense", ParallelConfig(tensor=2)),
    "dense-pp2": Layout(2, "dense", ParallelConfig(pipeline=2)),
    "tp2-pp2-ep2": Layout(4, "moe", ParallelConfig(tensor=2, pipeline=2, expert=2, recompute="full", **_OVERLAP)),
}
RESUMED = ("ep2", "tp2", "pp2")


def names(processes: int) -> list[str]:
    return [name for name, layout in LAYOUTS.items() if layout.processes == processes]


# --- the twin: the same weights in transformers -------------------------------------------------------------------------------


def make_twin(model: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """A transformers model of this shape, in fp32, with weights that only the seed decides (no near-ties in the router)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    kind, build = (Qwen3MoeConfig, Qwen3MoeForCausalLM) if model.num_experts else (Qwen3Config, Qwen3ForCausalLM)
    twin = build(kind(**hf_config(model, "float32", [0]))).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in twin.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(1 + 0.1 * noise if "norm" in name else (0.5 if "gate.weight" in name else 0.1) * noise)
    return twin


def twin_logprobs(twin: torch.nn.Module, item: Item, temperature: float = 1.0) -> Tensor:
    """Logprobs of an item's scored tokens, computed on this sequence alone."""
    tokens = torch.tensor([list(item.token_ids)])
    scored = torch.tensor(list(item.scored), dtype=torch.long)
    logits = twin(tokens).logits[0, scored - 1] / temperature
    return logits.log_softmax(-1).gather(1, tokens[0, scored, None])[:, 0]


def hf_tensors(twin: torch.nn.Module, get: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`get(parameter)` of every parameter under its name in a Hugging Face checkpoint (transformers itself splits experts)."""
    kept = [param.detach().clone() for param in twin.parameters()]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for param in twin.parameters():
            param.copy_(get(param))
        twin.save_pretrained(folder)
        for param, value in zip(twin.parameters(), kept, strict=True):
            param.copy_(value)
        return load_file(Path(folder) / "model.safetensors")


def write_oracle(model: ModelConfig, folder: Path) -> None:
    """What transformers says: weights (folder/NAME), and in NAME.pt logprobs, gradients and three AdamW steps."""
    twin, items = make_twin(model), random_items()
    twin.save_pretrained(folder / model.name)
    logprobs = {t: [twin_logprobs(twin, item, t).detach() for item in items] for t in (1.0, 0.7)}
    oracle: dict = {"logprobs": logprobs, "losses": [], "norms": []}
    decayed = [p for p in twin.parameters() if p.dim() > 1]
    norms = [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, eps=OPTIMIZER.eps)
    for step in range(3):
        adam.zero_grad()
        loss = sum(-(torch.tensor(item.fields["weights"]) * twin_logprobs(twin, item)).sum() for item in items)
        loss.backward()
        if step == 0:
            oracle["gradients"] = hf_tensors(twin, lambda p: p.grad)
        oracle["losses"].append(loss.item())
        oracle["norms"].append(torch.nn.utils.clip_grad_norm_(twin.parameters(), OPTIMIZER.clip_grad).item())
        adam.step()
    oracle["params"] = hf_tensors(twin, lambda p: p.detach())
    torch.save(oracle, folder / f"{model.name}.pt")


# --- rows -------------------------------------------------------------------------------------------------------------------


def random_items(seed: int = 0, trajectories: int = 4) -> list[Item]:
    """Groups of random shape: several pivots on one growing history, one to five actions each, some equal, some a prefix."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(256) for _ in range(rng.randint(low, high))]

    items = []
    for trajectory in range(trajectories):
        history = tokens(3, 8) if trajectory == 0 else tokens(20, 50)
        for _ in range(rng.randint(1, 3)):
            actions = [tokens(1, 12) for _ in range(rng.randint(1, 4))]
            if len(actions) > 1 and rng.random() < 0.6:
                actions.append(list(actions[0]))
            if len(actions) > 1 and rng.random() < 0.6:
                actions.append(actions[-1] + tokens(1, 5))
            for action in actions:
                span = range(len(history), len(history) + len(action))
                weights = [rng.uniform(-0.5, 1.0) / 100 for _ in action]
                items.append(Item([*history, *action], span, unit=str(trajectory), fields={"weights": weights}))
            history = history + actions[0] + tokens(5, 30)
    items.append(Item(history, range(len(history), len(history)), unit="empty action", fields={"weights": []}))
    return items


def splits(items: Sequence[Item]) -> dict[str, list[Row]]:
    """The same batch cut in ways that must not matter."""
    longest = max(len(item.token_ids) for item in items)
    alone = [replace(item, unit=str(index)) for index, item in enumerate(items)]
    return {
        "shared": pack(items, max_row_tokens=longest + 40, shared_prefix=True),
        "dense": pack(items, max_row_tokens=longest + 40, shared_prefix=False),
        "one row": pack(items, max_row_tokens=100_000, shared_prefix=True),
        "shuffled": pack(random.Random(1).sample(alone, len(alone)), max_row_tokens=longest, shared_prefix=True),
    }


def by_item(rows: Sequence[Row], values: Sequence[Tensor], count: int) -> list[Tensor]:
    """Entries of packed rows, sorted back to the items they came from."""
    found = [torch.empty(0)] * count
    for row, value in zip(rows, values, strict=True):
        for owner in row.owners_S.unique().tolist():
            found[owner] = value[row.owners_S == owner]
    return found


# --- measuring a policy -----------------------------------------------------------------------------------------------------


def make_config(name: str, **parallel_options: object) -> Config:
    layout = LAYOUTS[name]
    return Config(model=MODELS[layout.model], parallel=replace(layout.parallel, **parallel_options))


def make_policy(
    name: str = "single",
    *,
    optimizer: OptimizerConfig | None = OPTIMIZER,
    precision: str = "fp32",
    recompute: str | None = None,
    weights: Path | None = None,
) -> Policy:
    """A policy in the named layout with the twin's weights."""
    config = make_config(name) if recompute is None else make_config(name, recompute=recompute)
    config.precision = PrecisionConfig(name=precision, params=precision)
    policy = Policy(config, optimizer)
    policy.load_hf(weights or oracle_folder() / LAYOUTS[name].model)
    return policy


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """Whole tensors by Hugging Face name; empty on all but the main process."""
    return {name: tensor.clone() for name, tensor in policy.hf_weights() if tensor is not None}


def gradients_of(policy: Policy, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Whole gradients as the optimizer gets them (summed over ranks, before clipping); no update happens."""
    step, found = policy.optimizer.step, {}

    def capture() -> tuple[bool, float, int]:
        for chunk in policy.chunks:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:  # reduced gradients lie scattered over the data-parallel ranks
                    shards = bucket.grad_data.view(dist.get_world_size(group), -1)
                    dist.all_gather(list(shards), shards[dist.get_rank(group)].clone(), group=group)
        gatherer = hf_mapping.Gatherer(policy.config.model, policy.chunks)
        found.update((name, t.clone()) for name, t in gatherer.tensors(lambda p: p.main_grad) if t is not None)
        return True, 0.0, 0

    policy.optimizer.step = capture
    policy.train_step(rows, sft_loss, temperature=1.0, step=0)
    policy.optimizer.step = step
    return found


def replicas_agree(policy: Policy) -> bool:
    """Whether ranks that hold the same piece of a Hugging Face tensor hold the same bits of it."""
    own: dict[str, bytes] = {}
    agree = True
    for param, pieces in hf_mapping.table(policy.config.model, policy.chunks):
        for piece in pieces:
            data = param.detach()[piece.rows].contiguous().numpy().tobytes()
            agree &= own.setdefault(f"{piece.name}{piece.index}", data) == data
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return agree and all(theirs.get(key, data) == data for theirs in everyone for key, data in own.items())


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest max|a - b| / max|b| over tensors."""
    assert found.keys() == expected.keys()
    return max(((found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp(min=1e-12)).item() for k in expected)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest |a - b| over tensors."""
    assert found.keys() == expected.keys()
    return max((found[k] - expected[k]).abs().max().item() for k in expected)


def measure(name: str, folder: Path) -> dict[str, float]:
    """Largest differences of one layout from the twin, by what was compared. Every rank calls it; the main rank's count."""
    main, items = parallel.is_main, random_items()
    policy = make_policy(name, weights=folder / LAYOUTS[name].model)
    oracle = torch.load(folder / f"{LAYOUTS[name].model}.pt")
    found: dict[str, float] = {}
    batches = splits(items)
    for kind, temperature in (("shared", 1.0), ("dense", 1.0), ("shared", 0.7)):
        scored = by_item(batches[kind], policy.logprobs(batches[kind], temperature=temperature), len(items))
        pairs = zip(scored, oracle["logprobs"][temperature], strict=True)
        found[f"logprobs {kind} {temperature}"] = max((a - b).abs().max().item() for a, b in pairs if len(b))
    for kind, rows in batches.items() if LAYOUTS[name].processes == 1 else list(batches.items())[:3]:
        gradients = gradients_of(policy, rows)
        if main():
            found[f"gradients {kind}"] = relative(gradients, oracle["gradients"])
    loaded = weights_of(policy)
    if main():
        found["round trip"] = distance(loaded, load_file(folder / LAYOUTS[name].model / "model.safetensors"))
    for step, kind in enumerate(("shared", "dense", "one row")):
        metrics = policy.train_step(batches[kind], sft_loss, temperature=1.0, step=step)
        for key, value in (("loss", oracle["losses"][step]), ("grad_norm", oracle["norms"][step])):
            found[key] = max(found.get(key, 0.0), abs(metrics[key] / value - 1))
    after = weights_of(policy)
    if main():
        found["parameters"] = distance(after, oracle["params"])
    found["replicas differ"] = float(not replicas_agree(policy))
    if name in RESUMED:
        found |= resume(policy, name, folder)
    return found


def resume(policy: Policy, name: str, folder: Path) -> dict[str, float]:
    """Load the single process's checkpoint into this layout, do the step that it did next, and save for the way back."""
    before, after = (torch.load(folder / f"single_{moment}.pt") for moment in ("before", "after"))
    rows = splits(random_items(1))["shared"]
    step, version = checkpoint.load(policy, checkpoint.latest(folder / "checkpoints" / "single"))
    loaded = weights_of(policy)
    metrics = policy.train_step(rows, sft_loss, temperature=1.0, step=step)
    stepped = weights_of(policy)
    checkpoint.save(policy, folder / "checkpoints" / name, step + 1, version=version + 1)
    if not parallel.is_main():
        return {}
    torch.save(stepped, folder / f"{name}_after.pt")
    return {
        "resumed at": step,
        "resumed version": version,
        "resumed weights": distance(loaded, before),
        "resumed loss": abs(metrics["loss"] / after["metrics"]["loss"] - 1),
        "resumed grad_norm": abs(metrics["grad_norm"] / after["metrics"]["grad_norm"] - 1),
        "resumed step": distance(stepped, after["weights"]),
    }


def uneven_collectives() -> dict[str, bool]:
    """What gloo cannot do by itself, between two ranks: parts of three rows and of one."""
    rank, sizes = dist.get_rank(), [3, 1]
    parts = [torch.empty(size, 2) for size in sizes]
    dist.all_gather(parts, torch.full((sizes[rank], 2), float(rank + 1)))
    out, even = torch.empty(sizes[rank], 2), torch.empty(2)
    dist.reduce_scatter(out, [torch.full((size, 2), 10.0**index * (rank + 1)) for index, size in enumerate(sizes)])
    dist.reduce_scatter(even, [torch.ones(2), torch.ones(2) * 2])
    return {
        "gather": [part.flatten().tolist() for part in parts] == [[1.0] * 6, [2.0] * 2],
        "scatter": bool((out == 3.0 * 10**rank).all()),
        "even scatter": even.tolist() == [2.0 * (rank + 1)] * 2,
    }


# --- what the tests share ---------------------------------------------------------------------------------------------------


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="pivotrl-layouts-")


@functools.cache
def oracle_folder() -> Path:
    """A folder with both twins, made once per test process."""
    folder = Path(_temporary().name)
    for model in MODELS.values():
        write_oracle(model, folder)
    return folder


@functools.cache
def single_checkpoint() -> Path:
    """A checkpoint after two steps of one process, the weights there, and weights and metrics after its third step."""
    folder, rows = oracle_folder(), splits(random_items(1))["shared"]
    policy = make_policy()
    for step in range(2):
        policy.train_step(rows, sft_loss, temperature=1.0, step=step)
    checkpoint.save(policy, folder / "checkpoints" / "single", 2, version=5)
    torch.save(weights_of(policy), folder / "single_before.pt")
    metrics = policy.train_step(rows, sft_loss, temperature=1.0, step=2)
    torch.save({"weights": weights_of(policy), "metrics": metrics}, folder / "single_after.pt")
    return folder / "checkpoints" / "single"


@functools.cache
def measured(processes: int) -> dict[str, dict[str, float]]:
    """The measurements of all layouts of this many processes, by name, from one start of torchrun (none for one process)."""
    single_checkpoint()
    folder, wanted = oracle_folder(), names(processes)
    if processes == 1:
        return {name: measure(name, folder) for name in wanted}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    child = subprocess.Popen([*torchrun, __file__, str(folder), *wanted], env=environment, **pipes)
    try:
        output, _ = child.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    assert child.returncode == 0, output[-6000:]
    return json.loads((folder / f"measured_{processes}.json").read_text())


def main(arguments: Sequence[str]) -> None:
    from megatron.core import parallel_state

    folder, results = Path(arguments[0]), {}
    for name in arguments[1:]:
        began = time.perf_counter()
        results[name] = {**measure(name, folder), "seconds": time.perf_counter() - began}
        parallel_state.destroy_model_parallel()  # the next layout starts in the same processes
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, uneven_collectives() if len(everyone) == 2 else {})
    results["uneven collectives"] = {f"{name} on rank {rank}": good for rank, found in enumerate(everyone) for name, good in found.items()}
    if parallel.is_main():
        (folder / f"measured_{dist.get_world_size()}.json").write_text(json.dumps(results))
    parallel.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
