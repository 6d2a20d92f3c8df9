"""What a step's rollouts and losses say, as the numbers that metrics.jsonl keeps."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pivotrl.advantage import has_signal, moments
from pivotrl.types import Group


def rollout_statistics(groups: Sequence[Group]) -> dict[str, Any]:
    """Rewards, their deviation, dead groups, truncation and calls, with call turns and message turns apart."""
    rollouts = [r for group in groups for r in group.rollouts]
    judged = [[r.verdict.reward for r in group.rollouts if r.verdict.status == "ok"] for group in groups]
    rewards = [reward for group in judged for reward in group]
    deviations = [moments(group)[1] ** 0.5 for group in judged if group]
    stats: dict[str, Any] = {
        "reward_mean": mean(rewards),
        "reward_std": mean(deviations),
        "dead_group_share": mean([not has_signal(group) for group in judged]),
        "dropped_samples": len(rollouts) - len(rewards),
        "truncation_rate": mean([r.completion.finish_reason == "length" for r in rollouts]),
        "calls_per_reply": mean([r.num_calls for r in rollouts]),
        "completion_tokens_mean": mean([len(r.completion.token_ids) for r in rollouts]),
        "rollout_turns": len(rollouts),
        "rollout_tokens": sum(len(r.completion.token_ids) for r in rollouts),
        "prompt_tokens_mean": mean([len(group.prompt) for group in groups]),
    }
    for name, is_call in (("call", True), ("message", False)):
        of_kind = [r for group in groups if bool(group.expert_calls) == is_call for r in group.rollouts if r.verdict.status == "ok"]
        if of_kind:
            stats[f"reward_{name}_turns"] = mean([r.verdict.reward for r in of_kind])
            stats[f"calls_per_reply_{name}_turns"] = mean([r.num_calls for r in of_kind])
    return stats


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def normalised(metrics: dict[str, float]) -> dict[str, float]:
    """Weighted sums divided by the weight that took part; the loss itself is already an average over the whole step."""
    averages = ("clip_fraction", "importance_mean", "capped_share", "entropy", "logprob_gap", "kl")
    return {name: value / metrics["weight"] if name in averages else value for name, value in metrics.items() if name != "weight"}


def staleness(version: int, versions: Sequence[int]) -> dict[str, float]:
    """How many updates the policy of `version` is ahead of the completions' `versions`: mean, largest, and how many completions by n.

    Below zero where a killed run left rollouts of a policy newer than the checkpoint that training goes on from.
    """
    found = Counter(version - rollout for rollout in versions)
    behind = sum(count * number for number, count in found.items())
    stats: dict[str, float] = {"staleness_mean": behind / max(1, len(versions)), "staleness_max": max(found, default=0)}
    return stats | {f"staleness_count_{number}": found[number] for number in sorted(found)}


def speeds(stats: dict[str, Any], seconds: dict[str, float]) -> dict[str, float]:
    """Tokens per second of sampling and of updates. Sampling beside an update takes longer than the trainer waits for it (rollout_s)."""
    found = {"rollout_tokens_per_s": stats["rollout_tokens"] / max(stats["sampling_s"], 1e-9)}
    return found | ({"train_tokens_per_s": stats["train_tokens"] / seconds["update_s"]} if "update_s" in seconds else {})


def check_gap(metrics: dict[str, float], limit: float, *, step: int) -> None:
    """Every step's rollouts prove the weight sync before them: stop when trainer and engine have drifted apart.

    Only where the rollouts are the present policy's; of stale ones the gap is how far the policy has moved since.
    """
    gap = metrics["logprob_gap"] / metrics["weight"]
    if not gap <= limit:
        raise RuntimeError(
            f"step {step}: mean |rollout - policy logprob| is {gap:.2e}, over rollout.max_mean_logprob_gap={limit:.2e}: the engine "
            "does not sample from the trained weights; look at the weight sync and at precision.* before raising the limit"
        )


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sums over a run's metrics rows (all starts of a resumed run), for the manifest."""
    names = ("rollout_turns", "rollout_tokens", "profiling_turns", "profiling_tokens", "train_tokens", "weight_syncs")
    sums = {name: sum(row.get(name, 0) for row in rows) for name in names}
    return {**sums, "weight_syncs_verified": sums["weight_syncs"]}
