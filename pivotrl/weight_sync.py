"""Weight sync (also called refit): the one way from the trained policy to the rollout engines, and the proof that it worked.

`push` sends weights by rollout.weight_transport, a file that every server reads or a broadcast to all of them;
`check_logprobs` compares the engines' logprobs with the trainer's afterwards, whichever way the weights took.
"""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pivotrl.rollout import TensorInfo
from pivotrl.rollout.service import RolloutService

if TYPE_CHECKING:
    import torch

    from pivotrl.rollout.client import RolloutClient


@dataclass(frozen=True)
class SyncReport:
    """One finished weight sync. `checksum` covers names, dtypes, shapes and bytes of all tensors; `verified`: every server
    in rotation checked every tensor and reports the new version. `problems`: why servers left the rotation meanwhile."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    checksum: str
    verified: bool
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class LogprobGap:
    """|engine logprob - trainer logprob| in nats over `num_tokens` tokens."""

    mean: float
    max: float
    num_tokens: int


def push(weights: Iterable[tuple[str, "torch.Tensor"]], service: RolloutService | None, *, version: int) -> SyncReport | None:
    """Make every rollout engine sample from `weights` from now on, as `policy_version` = version.

    Call it while no request is in flight. `weights` are all tensors of the model under Hugging Face names, experts one by
    one. Where reading `weights` is collective, ranks without a service pass None: they only take part in the reading. Servers that
    sleep are woken. One that dies, hangs or gets damaged bytes leaves the rotation, and returns to it with all of the weights.

    Raises:
        ValueError: a name came twice.
        RuntimeError: a server refused the weights (missing or unexpected names, shapes; in a file, checksums), its message says which;
            or no server is left.
    """
    if service is None:
        for _ in weights:
            pass
        return None
    started = time.perf_counter()
    pushed = service.load_weights(weights, version=version)
    return SyncReport(
        version=version,
        num_tensors=len(pushed.tensors),
        num_bytes=sum(info.nbytes for info in pushed.tensors),
        seconds=time.perf_counter() - started,
        checksum=_total_checksum(pushed.tensors),
        verified=all(reported == version for reported in service.reported_versions()),
        problems=tuple(pushed.problems.values()),
    )


def _total_checksum(tensors: Sequence[TensorInfo]) -> str:
    digest = hashlib.sha256()
    for info in sorted(tensors, key=lambda info: info.name):
        digest.update(f"{info.name} torch.{info.dtype} {info.shape} {info.checksum:08x}\n".encode())
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
