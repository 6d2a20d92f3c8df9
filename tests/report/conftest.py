"""A small run folder made by hand, whose every number is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from pivotrl.records import write_json, write_jsonl
from pivotrl.types import Action, Candidate, Completion, Group, LocalRollout, Message, Pivot, Profile, Sample, ToolCall, Verdict


def entry(
    seconds: float, counts: dict[str, Any] | None = None, config: dict[str, Any] | None = None, status: str = "done"
) -> dict[str, Any]:
    """A stage's entry in the manifest."""
    return {
        "status": status,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T04:04:05+00:00" if status != "running" else None,
        "seconds": seconds,
        "error": None,
        "git": "0123456789abcdef",
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "config_digest": "fedcba9876543210",
        "config": config or {},
        "inputs": {},
        "counts": counts or {},
    }


def grpo_row(step: int, **changes: float | None) -> dict[str, Any]:
    row = {"stage": "train_grpo", "step": step, "time": 1.0, "reward_mean": 0.25 * step, "reward_std": 0.4, "dead_group_share": 0.5}
    row |= {
        "rollout_turns": 8,
        "rollout_tokens": 80,
        "train_tokens": 300,
        "entropy": 0.5,
        "clip_fraction": 0.0,
        "logprob_gap": 2e-7 * (step + 1),
    }
    row |= {
        "logprob_gap_max": 1e-6 * (step + 1),
        "grad_norm": 1.0,
        "rollout_s": 2.0,
        "logprobs_s": 0.0,
        "update_s": 1.5,
        "weight_sync_s": 0.5,
    }
    return row | {"peak_rss_gib": 2.0 + step} | changes


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pivot() -> Pivot:
    """The expert switches roaming on; half of the first policy's samples did."""
    history = (
        Message(role="user", content="My <phone> & data"),
        Message(role="assistant", content="hm"),
        Message(role="tool", content="roaming: off"),
    )
    expert = Action(tool_calls=(ToolCall(name="toggle_roaming", arguments={"on": True}),))
    return Pivot(
        candidate=Candidate(id="task|a:3", trajectory_id="task|a", task_id="a", domain="d", turn=3, history=history, expert=expert),
        mean=0.5,
        variance=0.25,
    )


@pytest.fixture
def run_dir(tmp_path: Path, pivot: Pivot) -> Path:
    """All seven stages done: 3 profiled turns of which 1 became a pivot, 3 GRPO steps (one without an update), both evaluations."""
    run = tmp_path / "demo"
    stages = {
        "extract_candidates": entry(1.0, {"candidates": 30}, {"domain.name": "d"}),
        "train_sft": entry(20.0),
        "profile_candidates": entry(
            5.0,
            {"profiled": 3, "samples": 11, "dropped_samples": 1, "dead_turn_share": 0.667, "strict_vs_functional_disagreement": 0.125},
            {"profile.num_samples": 4},
        ),
        "select_pivots": entry(0.5, {"kept": 1, "all_one": 2}, {"profile.max_mean": 0.6}),
        "train_grpo": entry(9.0, {"rollout_turns": 8, "weight_syncs": 4, "weight_syncs_verified": 3}),
        "export_hf": entry(2.0),
        "evaluate": entry(30.0),
    }
    write_json(run / "manifest.json", {"stages": stages})
    sft = [{"stage": "train_sft", "step": step, "loss": 5.0 - step, "peak_rss_gib": 1.0} for step in range(3)]
    grpo = [grpo_row(0), grpo_row(1), grpo_row(2, update_s=None, train_tokens=0, logprob_gap=None, logprob_gap_max=None)]
    write_metrics(run, sft + grpo)
    right, wrong = (
        Sample(text="<tool_call>right</tool_call>", reward=1.0, reason="same state"),
        Sample(text="wrong", reward=0.0, reason="no change"),
    )
    profiles = [Profile(candidate_id=pivot.candidate.id, samples=(right, wrong, wrong, right), mean=0.5, variance=0.25)]
    profiles += [Profile(candidate_id=f"easy:{i}", samples=(right,) * 4, mean=1.0) for i in range(2)]
    write_jsonl(run / "profiles" / "profiles.jsonl", profiles)
    write_jsonl(run / "pivots" / "pivots.jsonl", [pivot])
    write_jsonl(run / "rollouts" / "step_000001.jsonl", [group(pivot, rewards=(1.0, 1.0, 1.0, 0.0))])
    for label, success in (("before", 0.25), ("after", 0.75)):
        result = {
            "pivot_reward": success + 0.1,
            "task_success": success,
            "tasks": 4,
            "episode_ends": {"done": int(4 * success), "max_turns": 1},
        }
        write_json(run / "evaluation" / label / "result.json", result | {"out_of_domain": 0.6, "skills": {"sort": 0.6}})
    return run


def group(pivot: Pivot, rewards: tuple[float, ...]) -> Group:
    rollouts = tuple(
        LocalRollout(
            candidate_id=pivot.candidate.id,
            index=index,
            completion=Completion(token_ids=(1,), logprobs=(-0.1,), finish_reason="stop", policy_version=1),
            text="<tool_call>right</tool_call>" if reward else "wrong",
            verdict=Verdict(reward=reward, reason="same state" if reward else "no change"),
        )
        for index, reward in enumerate(rewards)
    )
    return Group(candidate_id=pivot.candidate.id, trajectory_id="task|a", expert_calls=1, prompt=(1, 2), rollouts=rollouts)


@pytest.fixture
def ahead_dir(run_dir: Path) -> Path:
    """The same run with sampling one step ahead: 8 fresh actions at first, then 2 fresh and 6 stale ones a step; gaps of probes."""
    stale = {"staleness_max": 1, "staleness_count_0": 2, "staleness_count_1": 6, "logprob_gap": 0.04, "logprob_gap_max": 2.0}
    rows = [grpo_row(0, staleness_max=0, staleness_count_0=8, sampling_s=2.0), *(grpo_row(i, sampling_s=4.0, **stale) for i in (1, 2))]
    probed = {"rollout_s": 0.01, "engine_gap": 1e-6, "engine_gap_max": 5e-6, "engine_check_s": 0.1}
    write_metrics(run_dir, [row | probed for row in rows])
    return run_dir
