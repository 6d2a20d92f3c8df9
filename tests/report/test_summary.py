"""The summary's numbers, from whole and from partial run folders."""

import json
import shutil
from pathlib import Path

import pytest

from pivotrl import report
from pivotrl.pipeline import ORDER
from pivotrl.records import write_json
from pivotrl.report import summary

KEYS = {
    "seconds", "candidates", "profiled", "pivots", "dead_turn_share", "strict_vs_functional_disagreement", "before", "after",
    "rollout_turns", "rollout_turns_profiling", "rollout_turns_training", "train_tokens_per_s", "rollout_tokens_per_s",
    "logprob_gap", "staleness", "weight_sync", "peak_rss_gib",
}  # fmt: skip


def change_manifest(run_dir: Path, keep: set[str]) -> None:
    stages = json.loads((run_dir / "manifest.json").read_text())["stages"]
    write_json(run_dir / "manifest.json", {"stages": {name: entry for name, entry in stages.items() if name in keep}})


def test_every_number_of_a_whole_run(run_dir: Path) -> None:
    found = summary(run_dir)
    assert set(found) == KEYS
    seconds = {stage: value for stage, value in found["seconds"].items() if value is not None}
    assert seconds == dict(zip(ORDER, (1.0, 20.0, 5.0, 0.5, 9.0, 2.0, 30.0), strict=True))
    assert (found["candidates"], found["profiled"], found["pivots"]) == (30, 3, 1)
    assert (found["dead_turn_share"], found["strict_vs_functional_disagreement"]) == (0.667, 0.125)
    assert found["before"] == {"pivot_reward": 0.35, "task_success": 0.25, "out_of_domain": 0.6}
    assert found["after"] == {"pivot_reward": 0.85, "task_success": 0.75, "out_of_domain": 0.6}
    assert found["weight_sync"] == {"count": 4, "verified": 3}
    assert found["peak_rss_gib"] == 4.0


def test_rollout_turns_count_dropped_samples_and_all_steps_of_a_resumed_run(run_dir: Path) -> None:
    found = summary(run_dir)  # the manifest's total of 8 is of the last start alone
    assert (found["rollout_turns_profiling"], found["rollout_turns_training"], found["rollout_turns"]) == (12, 24, 36)


def test_rates_leave_out_steps_without_an_update(run_dir: Path) -> None:
    found = summary(run_dir)
    assert found["train_tokens_per_s"] == pytest.approx(600 / 3.0)
    assert found["rollout_tokens_per_s"] == pytest.approx(240 / 6.0)
    assert found["logprob_gap"] == {"mean": pytest.approx(3e-7), "max": 2e-6}


def test_of_stale_rollouts_the_probes_tell_the_gap_and_the_thread_the_speed(ahead_dir: Path) -> None:
    """Their own gap is how far the policy has moved, and the trainer hardly waited for them."""
    found = summary(ahead_dir)
    assert found["logprob_gap"] == {"mean": pytest.approx((2e-7 + 2e-6) / 3), "max": 5e-6}
    assert found["rollout_tokens_per_s"] == pytest.approx(240 / 10) and found["staleness"] == {"0": 12, "1": 12}


def test_a_run_that_has_only_begun_has_nulls(tmp_path: Path, run_dir: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run_dir / "manifest.json", bare)
    change_manifest(bare, {"extract_candidates"})
    found = summary(bare)
    assert set(found) == KEYS
    assert found["candidates"] == 30 and found["seconds"]["extract_candidates"] == 1.0
    nothing = {"pivot_reward": None, "task_success": None, "out_of_domain": None}
    assert found["before"] == found["after"] == nothing
    assert found["logprob_gap"] == {"mean": None, "max": None} and found["weight_sync"] == {"count": None, "verified": None}
    assert found["staleness"] == {}
    assert {key for key in KEYS if found[key] is None} == KEYS - {
        "staleness",
        "seconds",
        "candidates",
        "before",
        "after",
        "logprob_gap",
        "weight_sync",
    }
    assert all(found["seconds"][stage] is None for stage in ORDER[1:])


def test_profiles_of_another_run_are_found_by_the_config(tmp_path: Path, run_dir: Path) -> None:
    ablation = tmp_path / "ablation"
    ablation.mkdir()
    shutil.copy(run_dir / "manifest.json", ablation)
    change_manifest(ablation, {"train_grpo"})
    (ablation / "config.yaml").write_text(f"profiles_path: {run_dir / 'profiles'}\npivots_path: {run_dir / 'pivots'}\n")
    found = summary(ablation)
    assert (found["profiled"], found["pivots"], found["rollout_turns_profiling"]) == (3, 1, 12)
    assert found["dead_turn_share"] == pytest.approx(2 / 3)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no manifest.json"):
        summary(tmp_path)


def test_table_for_the_terminal(run_dir: Path) -> None:
    lines = report.text_table(run_dir).splitlines()
    assert "total                    67.5" in lines
    assert "candidates 30, profiled 3, pivots 1" in lines
    assert any(line.startswith("kept 1 (33.3 %)") for line in lines)
    assert next(line for line in lines if line.startswith("task_success")).split() == ["task_success", "0.250", "0.750", "+0.500"]
