"""Every recipe once, in order: what it writes, that a second start does nothing, and that another config is refused."""

import json
from pathlib import Path

import pytest
import torch

from pivotrl import metrics
from pivotrl.pipeline import ORDER
from pivotrl.recipe import compose
from pivotrl.records import read_jsonl
from pivotrl.run_folder import RunFolder
from pivotrl.stages import STAGES
from pivotrl.types import Candidate, Episode, Group, Pivot, Profile, Trajectory

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.timeout(1800)]

DIAGNOSTICS = {
    "reward_mean", "reward_std", "dead_group_share", "clip_fraction", "entropy", "grad_norm", "logprob_gap", "truncation_rate",
    "calls_per_reply", "rollout_tokens_per_s", "train_tokens_per_s", "rollout_s", "update_s", "weight_sync_s", "policy_version",
}  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return compose("experiment=smoke")


def test_every_stage_is_done_and_left_its_files(trained, config):
    manifest = RunFolder(trained).manifest()
    assert list(manifest) == list(ORDER)
    here = compose("experiment=smoke", f"run_dir={trained}")
    for stage, entry in manifest.items():
        assert entry["status"] == "done" and entry["error"] is None and entry["seconds"] > 0, stage
        assert all(path.exists() for path in STAGES[stage].outputs(here)), stage
        assert (trained / "configs" / f"{stage}.yaml").exists()
    assert not list(trained.rglob("*.journal.jsonl")) and not list(trained.rglob("*.tmp*")) and not (trained / "error.log").exists()


def test_candidates_are_the_turns_of_the_train_tasks(trained, config):
    trajectories = read_jsonl(trained / "candidates/trajectories.jsonl", Trajectory)
    tasks = {split: {t.task_id for t in trajectories if t.split == split} for split in ("heldout", "warmup", "train")}
    assert {split: len(ids) for split, ids in tasks.items()} == {"heldout": 3, "warmup": 4, "train": 4}
    assert len(set().union(*tasks.values())) == 11, "no task is in two splits"
    for name, split in (("candidates", "train"), ("heldout", "heldout")):
        candidates = read_jsonl(trained / f"candidates/{name}.jsonl", Candidate)
        turns = [m for t in trajectories if t.split == split for m in t.messages if m.role == "assistant"]
        assert len(candidates) == len(turns) and {c.task_id for c in candidates} == tasks[split]
    counts = RunFolder(trained).manifest()["extract_candidates"]["counts"]
    assert counts["candidates"] == len(read_jsonl(trained / "candidates/candidates.jsonl", Candidate))


def test_warm_up_learns(trained, config):
    losses = [row["loss"] for row in metrics.read(trained, "train_sft")]
    assert len(losses) == config.sft.num_steps and sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_profiles_and_pivots_agree(trained, config):
    profiles = read_jsonl(trained / "profiles/profiles.jsonl", Profile)
    assert len(profiles) == config.profile.max_candidates == len({p.candidate_id for p in profiles})
    for profile in profiles:
        rewards = [sample.reward for sample in profile.samples]
        assert len(rewards) == (0 if profile.excluded else config.profile.num_samples)
        assert profile.mean == pytest.approx(sum(rewards) / max(1, len(rewards)))
        assert profile.variance == pytest.approx(sum((r - profile.mean) ** 2 for r in rewards) / max(1, len(rewards)))
    pivots = read_jsonl(trained / "pivots/pivots.jsonl", Pivot)
    kept = [p.candidate_id for p in profiles if p.variance > 0 and p.mean < config.profile.max_mean]
    assert [pivot.candidate.id for pivot in pivots] == kept and kept
    manifest = RunFolder(trained).manifest()
    assert manifest["select_pivots"]["counts"]["kept"] == len(kept)
    assert sum(manifest["select_pivots"]["counts"].values()) == len(profiles)
    assert manifest["profile_candidates"]["counts"]["samples"] == sum(len(p.samples) for p in profiles)


def test_training_reports_every_diagnostic(trained, config):
    rows = metrics.read(trained, "train_grpo")
    algorithm = config.algorithm
    pivots = len(read_jsonl(trained / "pivots/pivots.jsonl", Pivot))
    assert [row["step"] for row in rows] == list(range(algorithm.num_steps))
    for row in rows:
        assert DIAGNOSTICS <= row.keys()
        assert row["rollout_turns"] == min(pivots, algorithm.pivots_per_step) * algorithm.group_size
        assert 0 < row["reward_mean"] < 1 and row["reward_std"] > 0 and row["grad_norm"] > 0 and row["entropy"] > 0
        assert row["logprob_gap"] < config.rollout.max_mean_logprob_gap and row["clip_fraction"] == 0, "one update a step is on-policy"
    assert [row["policy_version"] for row in rows] == [1, 2, 3]
    for step in range(algorithm.num_steps):
        groups = read_jsonl(trained / f"rollouts/step_{step:06d}.jsonl", Group)
        assert {r.completion.policy_version for g in groups for r in g.rollouts} == {step}
    counts = RunFolder(trained).manifest()["train_grpo"]["counts"]
    assert counts["weight_syncs"] == counts["weight_syncs_verified"] == algorithm.num_steps
    assert counts["rollout_turns"] == sum(row["rollout_turns"] for row in rows)


def test_export_loads_in_transformers_and_is_the_trained_policy(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before, after = (AutoModelForCausalLM.from_pretrained(trained / "hf" / name) for name in ("sft", "final"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert len(AutoTokenizer.from_pretrained(trained / "hf/final")) <= after.config.vocab_size
    assert RunFolder(trained).manifest()["export_hf"]["counts"]["max_logprob_difference"] < 1e-4
    group = read_jsonl(trained / "rollouts/step_000000.jsonl", Group)[0]
    rollout = group.rollouts[0].completion
    tokens = torch.tensor([[*group.prompt, *rollout.token_ids]])
    with torch.no_grad():
        logprobs = before(tokens).logits[0, len(group.prompt) - 1 : -1].log_softmax(-1)
    found = logprobs.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
    assert torch.allclose(found, torch.tensor(rollout.logprobs), atol=1e-4), "the first rollouts come from the warmed-up policy"


def test_evaluation_measures_both_policies(trained, config):
    actions = []
    for label in ("before", "after"):
        result = json.loads((trained / f"evaluation/{label}/result.json").read_text())
        assert result["pivot_candidates"] == config.evaluation.max_pivot_candidates
        assert all(0 <= result[name] <= 1 for name in ("pivot_reward", "task_success", "out_of_domain"))
        episodes = read_jsonl(trained / f"evaluation/{label}/episodes.jsonl", Episode)
        assert len(episodes) == result["tasks"] == config.evaluation.max_tasks
        assert all(0 < episode.turns <= config.evaluation.max_turns for episode in episodes)
        actions.append([episode.actions for episode in episodes])
    assert actions[0] != actions[1], "the servers held the policies that they were asked for"


def test_a_second_start_says_that_it_is_done(recipes, trained):
    before = state(trained)
    for pair in zip(ORDER[::2], [*ORDER[1::2], None], strict=True):
        running = [(stage, recipes.start(stage, trained)) for stage in pair if stage]
        for stage, process in running:
            finished = recipes.wait(process)
            assert finished.code == 0 and "already" in finished.output, (stage, finished.output, finished.errors[-2000:])
    assert state(trained) == before


@pytest.mark.parametrize(
    ("stage", "override", "line"),
    [
        ("extract_candidates", "domain.num_train_tasks=5", "domain.num_train_tasks: 4 -> 5"),
        ("select_pivots", "profile.max_mean=0.3", "profile.max_mean: 0.8 -> 0.3"),
        ("train_grpo", "algorithm.clip_high=0.28", "algorithm.clip_high: 0.2 -> 0.28"),
    ],
)
def test_a_changed_config_is_refused_by_name(recipes, trained, stage, override, line):
    before = state(trained)
    message = recipes.fail(stage, trained, override)
    assert line in message and "on_change=restart" in message
    assert state(trained) == before


def state(run: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of everything that a stage made."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "error.log")
    return {str(path.relative_to(run)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
