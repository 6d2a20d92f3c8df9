"""Sampling one step ahead with the real trainer and engine: what is trained on, how a run leaves and goes on, and back to synchronous."""

import shutil
import signal

import pytest

from pivotrl import metrics
from pivotrl.records import read_jsonl
from pivotrl.run_folder import RunFolder
from pivotrl.types import Group

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.timeout(1800)]

AHEAD = ("algorithm=grpo_async", "algorithm.pivots_per_step=4", "algorithm.group_size=4", "algorithm.num_steps=4")


def versions(run, step):
    groups = read_jsonl(run / f"rollouts/step_{step:06d}.jsonl", Group)
    return {rollout.completion.policy_version for group in groups for rollout in group.rollouts}


@pytest.fixture(scope="module")
def ahead(recipes, engine, selected, tmp_path_factory):
    """A run of four steps, sampled one step ahead."""
    run = tmp_path_factory.mktemp("ahead") / "run"
    folders = [f"{name}_path={selected / name}" for name in ("candidates", "profiles", "pivots")]
    recipes.run("train_grpo", run, *folders, f"model.hf_path={selected / 'hf' / 'sft'}", engine, *AHEAD)
    return run


def test_each_step_trains_on_rollouts_of_the_policy_before(ahead):
    rows = metrics.read(ahead, "train_grpo")
    served = [0, *(row["policy_version"] for row in rows)]  # before each step
    assert [versions(ahead, step) for step in range(4)] == [{served[0]}, {served[0]}, {served[1]}, {served[2]}]
    assert [row["staleness_max"] for row in rows] == [0, *(served[step] - served[step - 1] for step in range(1, 4))]
    assert sum(row.get("staleness_count_1", 0) for row in rows) >= 16, "a run in which nothing was stale shows nothing"
    counts = RunFolder(ahead).manifest()["train_grpo"]["counts"]
    assert counts["weight_syncs"] == counts["weight_syncs_verified"] == rows[-1]["policy_version"] >= 3


def test_stale_rollouts_differ_from_the_policy_and_the_probes_do_not(ahead):
    """The gap of stale rollouts is over the tolerance, the run goes on, and after each push the engines are proven on probes."""
    rows = metrics.read(ahead, "train_grpo")
    stale = [row for row in rows if row["staleness_max"] > 0 and "loss" in row]
    assert max(row["logprob_gap"] for row in stale) > 1e-3 and rows[0]["logprob_gap"] < 1e-5
    assert all(0.5 < row["importance_mean"] < 2 and 0 <= row["capped_share"] < 0.1 for row in stale)
    probed = [row for row in rows if "weight_syncs" in row]
    assert len(probed) >= 3 and all(row["engine_gap"] < 1e-5 for row in probed)
    assert metrics.events(ahead, "train_grpo", "stale_rollouts") == []


def test_two_ranks_asked_to_leave_save_and_go_on_without_paying_twice(recipes, engine, inputs, ahead, tmp_path):
    run, slow = tmp_path / "left", (*inputs, engine, *AHEAD, "rollout.max_inflight=1", "domain.verifier_workers=0", "parallel.tensor=2")
    journal = run / "rollouts/step_000002.journal.jsonl"
    process = recipes.start("train_grpo", run, *slow, processes=2)
    recipes.wait_until(process, lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 1)
    process.send_signal(signal.SIGUSR1)
    finished = recipes.wait(process)
    assert finished.code == 85 and "everything is saved" in finished.errors, finished.errors[-4000:]
    saved = int((run / "checkpoints/grpo/latest").read_text().removeprefix("step_"))
    paid = {path: path.read_bytes() for path in (run / "rollouts").glob("step_??????.jsonl")}
    groups = read_jsonl(journal, Group) if journal.exists() else []
    assert saved in (1, 2) and len(paid) >= 2 and (groups or len(paid) == 3)

    recipes.run("train_grpo", run, *slow, processes=2)
    assert all(path.read_bytes() == before for path, before in paid.items())
    assert all(group in read_jsonl(run / "rollouts/step_000002.jsonl", Group) for group in groups)
    rows = metrics.read(run, "train_grpo")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and max(row["staleness_max"] for row in rows) == 1
    assert metrics.events(run, "train_grpo", "stale_rollouts") == []
    assert [versions(run, step) for step in (0, 1)] == [versions(ahead, step) for step in (0, 1)]


def test_synchronous_training_does_not_take_stale_rollouts_over(recipes, engine, inputs, ahead, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ahead / "rollouts", run / "rollouts")
    recipes.run("train_grpo", run, *inputs, engine, *AHEAD, "algorithm.max_staleness=0", "algorithm.num_steps=2")
    (event,) = metrics.events(run, "train_grpo", "stale_rollouts")
    assert (event["step"], event["oldest_version"], event["policy_version"], event["max_staleness"]) == (1, 0, 1, 0)
    assert versions(run, 1) == {1} and versions(ahead, 1) == {0}
    rows = metrics.read(run, "train_grpo")
    assert [row["staleness_max"] for row in rows] == [0, 0] and all(row["logprob_gap"] < 1e-5 for row in rows)
    assert (run / "rollouts/step_000000.jsonl").read_bytes() == (ahead / "rollouts/step_000000.jsonl").read_bytes()
