"""Sharded checkpoints of model and optimizer through megatron.core.dist_checkpointing.

A checkpoint is written under a temporary name, then renamed, then `latest` is replaced: a kill at any moment leaves the
previous one usable. Tensors are stored by global index, so another layout can load them.
"""

import copy
import logging
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pivotrl.megatron import device, parallel
from pivotrl.megatron.policy import Policy
from pivotrl.records import write_bytes

device.install()

import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from pivotrl.megatron.model import unwrap  # noqa: E402

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def save(policy: Policy, folder: Path, step: int, *, version: int = 0, keep_last: int = 2) -> Path:
    """Write `folder`/step_N and point `latest` at it; older ones beyond `keep_last` are removed. Every process calls it."""
    target = folder / f"step_{step:06d}"
    partial = target.with_name(target.name + ".tmp")
    if filesystem_async._results_queue is None and not torch.cuda.is_available():
        # Megatron starts a spawned manager process for this queue, which costs seconds; forked it costs milliseconds.
        filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    if parallel.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    policy.settle()
    dist.barrier()
    dist_checkpointing.save(_state(policy, step, version, loading=False), str(partial), content_metadata=_METADATA, async_strategy="mcore")
    dist.barrier()
    if parallel.is_main():
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        write_bytes(folder / "latest", target.name.encode())
        others = sorted(path for path in folder.glob("step_*[0-9]") if path != target)  # a killed run may have left later steps
        for old in others[: max(0, len(others) + 1 - keep_last)]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or None if none was ever finished."""
    pointer = folder / "latest"
    return folder / pointer.read_text() if pointer.exists() else None


def load(policy: Policy, checkpoint: Path) -> tuple[int, int]:
    """Load the model, and the optimizer where the policy has one; returns (steps done, policy version).

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
    state = dist_checkpointing.load(_state(policy, 0, 0, loading=True), str(checkpoint))
    for index, chunk in enumerate(policy.chunks):
        unwrap(chunk).load_state_dict(state[f"model{index}"])
    if policy.optimizer is not None:
        policy.optimizer.load_state_dict(_fit_optimizers(state["optimizer"], policy.optimizer))
    return int(state["step"]), int(state["version"])


def _state(policy: Policy, step: int, version: int, *, loading: bool) -> dict[str, Any]:
    metadata = {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    models = {f"model{i}": unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(policy.chunks)}
    state: dict[str, Any] = {**models, "step": step, "version": version}
    if policy.optimizer is not None:
        own = models["model0"] if len(models) == 1 else models
        state["optimizer"] = policy.optimizer.sharded_state_dict(own, is_loading=loading, metadata=metadata)
    return state


def _fit_optimizers(state: dict, optimizer: Any) -> dict:
    """Reshape the optimizer's plain (non-tensor) state between EP = 1 (one optimizer) and EP > 1 (dense and expert ones).

    dist_checkpointing has already resharded the tensors; only Megatron's container of them differs.
    """
    count = len(getattr(optimizer, "chained_optimizers", [optimizer]))
    if count == 1 and "optimizer" not in state and 0 in state:
        plain = {key: value for key, value in state.items() if not isinstance(key, int)}
        return {**plain, "optimizer": state[0]["optimizer"], "param_state_sharding_type": state[0]["param_state_sharding_type"]}
    if count > 1 and "optimizer" in state:
        fitted = {}
        for index, inner in enumerate(optimizer.chained_optimizers):
            groups = copy.deepcopy(state["optimizer"])
            kinds = {group.get("is_expert_parallel", False) for group in inner.optimizer.param_groups}
            if len(kinds) == 1:
                for group in groups["param_groups"]:
                    group["is_expert_parallel"] = next(iter(kinds))
            fitted[index] = {**state.get(index, {}), "optimizer": groups, "param_state_sharding_type": state["param_state_sharding_type"]}
        return fitted
    return state
