"""Weight sync (also called refit): the one way from the trained policy to the rollout engines, and the proof that it worked.

`push` sends weights, `check_logprobs` compares the engines' logprobs with the trainer's afterwards. The transport today is
a safetensors file that every server reads; a broadcast between GPUs can take its place behind the same `push`.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pivotrl.rollout import WeightFile, tensor_checksum
from pivotrl.rollout.service import RolloutService

if TYPE_CHECKING:
    import torch

    from pivotrl.rollout.client import RolloutClient


@dataclass(frozen=True)
class SyncReport:
    """One finished weight sync. `checksum` covers names, dtypes, shapes and bytes of all tensors; `verified`: every server
    checked every tensor and reports the new version."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    checksum: str
    verified: bool


@dataclass(frozen=True)
class LogprobGap:
    """|engine logprob - trainer logprob| in nats over `num_tokens` tokens."""

    mean: float
    max: float
    num_tokens: int


def push(weights: Iterable[tuple[str, "torch.Tensor"]], service: RolloutService | None, *, version: int) -> SyncReport | None:
    """Make every rollout engine sample from `weights` from now on, as `policy_version` = version.

    Call it while no request is in flight. `weights` are all tensors of the model under Hugging Face names, experts one by
    one. Where reading `weights` is collective, ranks without a service pass None: they only take part in the reading.

    Raises:
        ValueError: a name came twice.
        RuntimeError: a server refused the weights (missing or unexpected names, shapes, checksums); its message says which.
    """
    if service is None:
        for _ in weights:
            pass
        return None
    started = time.perf_counter()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if name in tensors:
            raise ValueError(f"weight {name!r} came twice: yield every Hugging Face name once")
        tensors[name] = tensor.detach().cpu().contiguous()
    file = _write(tensors, service, version)
    service.load_weights(file)
    return SyncReport(
        version=version,
        num_tensors=len(tensors),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        seconds=time.perf_counter() - started,
        checksum=_total_checksum(tensors, file.checksums),
        verified=all(reported == version for reported in service.reported_versions()),
    )


def _write(tensors: dict[str, "torch.Tensor"], service: RolloutService, version: int) -> WeightFile:
    from safetensors.torch import save_file

    path = service.weights_path(version)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)
    return WeightFile(path=path, version=version, checksums={name: tensor_checksum(tensor) for name, tensor in tensors.items()})


def _total_checksum(tensors: dict[str, "torch.Tensor"], checksums: dict[str, int]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} {checksums[name]:08x}\n".encode())
    return digest.hexdigest()


def check_logprobs(
    client: "RolloutClient", token_rows: Sequence[Sequence[int]], trainer_logprobs: Sequence[Sequence[float]], *, max_mean_gap: float
) -> LogprobGap:
    """Compare the engines' logprobs of `token_rows` with the trainer's, at temperature 1.

    `trainer_logprobs[r][t]` is log p(token_rows[r][t + 1] | token_rows[r][: t + 1]): one entry less than the row has tokens.

    Raises:
        RuntimeError: the mean |gap| exceeds `max_mean_gap` nats (or is not a number); names the probable causes.
        ValueError: lengths do not match.
    """
    engine_logprobs = client.score(token_rows)
    gaps = []
    for engine, trainer in zip(engine_logprobs, trainer_logprobs, strict=True):
        gaps += [abs(a - float(b)) for a, b in zip(engine, trainer, strict=True)]
    if not gaps:
        raise ValueError("no tokens to compare: give rows of at least two tokens")
    gap = LogprobGap(mean=sum(gaps) / len(gaps), max=max(gaps), num_tokens=len(gaps))
    if not gap.mean <= max_mean_gap:
        raise RuntimeError(
            f"rollout engine and trainer disagree: mean |logprob gap| {gap.mean:.2e} nats over {gap.num_tokens} tokens "
            f"(max {gap.max:.2e}), allowed {max_mean_gap:.2e} (rollout.max_mean_logprob_gap). Probable causes: the engine serves "
            "older or other weights than the trainer holds; the weight sync corrupted the experts (vLLM on CPU without the "
            "prepack repair); a Hugging Face name maps to the wrong tensor; rope, norm or router settings differ between the "
            "model's config.json and the trainer; bf16 on either side (compare in fp32, or allow about 0.05)"
        )
    return gap
