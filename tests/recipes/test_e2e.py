"""End-to-end RL and SFT as methods, real: vLLM plays episodes in the tau2 world, Megatron trains, exports are evaluated."""

import json
from pathlib import Path

import pytest

from pivotrl import metrics
from pivotrl.records import read_jsonl
from pivotrl.run_folder import RunFolder
from pivotrl.types import Episode, EpisodeRollout

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.timeout(1800)]

TRAIN = ("algorithm.num_steps=2", "e2e.tasks_per_step=2", "e2e.max_turns=4", "evaluation.every_steps=2")


@pytest.fixture(scope="module")
def start(warmed, engine) -> list[str]:
    """Overrides of a run folder of its own: candidates and pi_0 of the shared one, on the shared server."""
    return [f"candidates_path={warmed / 'candidates'}", f"model.hf_path={warmed / 'hf' / 'sft'}", engine]


@pytest.fixture(scope="module")
def played(recipes, start, tmp_path_factory) -> Path:
    """Two steps of end-to-end RL, exported and evaluated."""
    run = tmp_path_factory.mktemp("e2e") / "run"
    recipes.run("train_e2e", run, *start, *TRAIN)
    for stage in ("export_hf", "evaluate"):
        recipes.run(stage, run, *start)
    return run


def rollouts_of(run: Path, step: int) -> list[EpisodeRollout]:
    return read_jsonl(run / f"rollouts/step_{step:06d}.jsonl", EpisodeRollout)


def test_two_steps_of_end_to_end_rl(played):
    rows, steps = metrics.read(played, "train_e2e"), [rollouts_of(played, step) for step in range(2)]
    assert [row["step"] for row in rows] == [0, 1] and len(list(played.glob("rollouts/*.jsonl"))) == 2
    for row, rollouts in zip(rows, steps, strict=True):
        assert row["rollout_turns"] == sum(len(rollout.turns) for rollout in rollouts)
        assert row["episodes"] == len(rollouts) == 2 * 4 and {rollout.end for rollout in rollouts} <= {"done", "max_turns"}
        assert row["reward_mean"] == sum(rollout.reward for rollout in rollouts) / 8 and row["environment_s"] > 0
        versions = {turn.completion.policy_version for rollout in rollouts for turn in rollout.turns}
        assert versions == {row["policy_version"] - row.get("weight_syncs", 0)}, "sampled by the policy before the update"
    assert all(entry["status"] == "done" for entry in RunFolder(played).manifest().values())


def test_what_was_trained_is_exported_and_evaluated(played):
    (event,) = metrics.events(played, "train_e2e", "evaluation")
    results = {label: json.loads((played / f"evaluation/{label}/result.json").read_bytes()) for label in ("before", "after")}
    assert event["step"] == 1 and all(result["tasks"] == 2 for result in results.values())
    assert results["after"] == {key: value for key, value in event.items() if key in results["after"]}


def test_a_run_folder_is_trained_in_one_way(recipes, played, start):
    said = recipes.fail("train_grpo", played, *start, f"pivots_path={played / 'rollouts'}")
    assert "holds the output of train_e2e, where train_grpo would write: give train_grpo a run_name of its own" in said


def test_a_killed_step_goes_on_with_its_journal(recipes, played, start, tmp_path):
    run = tmp_path / "run"
    journal = run / "rollouts/step_000000.journal.jsonl"
    process = recipes.start("train_e2e", run, *start, *TRAIN)
    recipes.kill_when(process, lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 2)
    done = read_jsonl(journal, EpisodeRollout)
    recipes.run("train_e2e", run, *start, *TRAIN)
    ended = {(r.task_id, r.index): r for r in rollouts_of(run, 0)}
    assert len(done) >= 2 and all(ended[r.task_id, r.index] == r for r in done), "what was paid for is kept, to the microsecond"
    for step in range(2):
        texts = [[[turn.text for turn in rollout.turns] for rollout in rollouts_of(folder, step)] for folder in (run, played)]
        assert texts[0] == texts[1]


def test_a_domain_without_an_environment_is_one_sentence(recipes, tmp_path):
    said = recipes.fail("train_e2e", tmp_path / "run", "domain=terminal")
    assert "domain 'terminal': environment None cannot be acted in" in said and "recipes/train_grpo.py" in said


def test_end_to_end_rl_answers_sql_questions(recipes, shared_data, engine, warmed, tmp_path):
    run = tmp_path / "run"
    sql = ("domain=sql", f"domain.data_path={shared_data / 'intercode_sql'}", f"model.hf_path={warmed / 'hf' / 'sft'}", engine)
    recipes.run("extract_candidates", run, *sql)
    recipes.run("train_e2e", run, *sql, "algorithm.num_steps=1", "e2e.tasks_per_step=2", "e2e.max_turns=3")
    (row,) = metrics.read(run, "train_e2e")
    rollouts = read_jsonl(run / "rollouts/step_000000.jsonl", EpisodeRollout)
    assert row["episodes"] == len(rollouts) == 8 and row["episodes_error"] == 0 and row["rollout_turns"] == 8 * 3


def test_sft_on_the_training_tasks_from_pi_0(recipes, start, warmed, tmp_path):
    """The paper's baseline: the same expert trajectories, no skills, a run folder of its own."""
    run = tmp_path / "run"
    method = (*start, "sft.split=train", "sft.skill_share=0", "sft.train_tokenizer=false", "sft.num_steps=12", "sft.optimizer.lr=3e-3")
    recipes.run("train_sft", run, *method)
    rows = metrics.read(run, "train_sft")
    assert len(rows) == 12 and rows[-1]["loss"] < rows[0]["loss"] < 3, "it goes on from pi_0"
    assert [rows[0]["learning_rate"], rows[-1]["learning_rate"]] == [pytest.approx(6e-4), pytest.approx(1e-3, rel=0.2)]
    assert (run / "hf/sft/tokenizer.json").read_bytes() == (warmed / "hf/sft/tokenizer.json").read_bytes()
    recipes.run("evaluate", run, *method, f"evaluation.policies=[{run / 'hf/sft'}]")
    assert len(read_jsonl(run / "evaluation/sft/episodes.jsonl", Episode)) == 2
