"""The scripts of slurm/ on a real Slurm: a whole chain of the smoke experiment, with one profiling task killed on the way."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import REPOSITORY, SMOKE  # noqa: E402

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("algorithm.num_step=3", "algorithm.num_step"),
        ("parallel.pipeline=3", "does not divide the 2 processes"),
        ("cluster.rollout_nodes=1", "cluster.network_rollout=true"),
    ],
)
def test_a_bad_override_uses_no_allocation(cluster, launch, tmp_path, override, sentence):
    before = cluster.jobs()
    refused = launch("--submit", f"run_dir={tmp_path / 'run'}", override)
    assert refused.returncode == 1 and sentence in refused.stderr and "Traceback" not in refused.stderr
    assert cluster.jobs() == before and not (tmp_path / "run").exists()


def test_sbatch_refusing_a_job_leaves_none(cluster, launch, tmp_path):
    before = cluster.jobs()
    refused = launch("--submit", f"run_dir={tmp_path}", "cluster.nodes=8")
    assert refused.returncode == 1 and "sbatch refused job 'sft'" in refused.stderr
    cluster.wait_for(lambda: cluster.jobs() == before, 30)


def test_a_chains_jobs_wait_for_each_other(cluster, submit, tmp_path):
    jobs = submit(f"run_dir={tmp_path / 'run'}", "profile.num_shards=3", "cluster.sbatch_options=['--hold']")
    try:
        assert list(jobs) == ["extract", "sft", "profile", "join", "select", "train", "evaluate"]
        dependencies = {name: set(re.findall(r"afterok:(\d+)", cluster.show(job)["Dependency"])) for name, job in jobs.items()}
    finally:
        cluster.command("scancel", *jobs.values())
    before = {"sft": ["extract"], "profile": ["extract", "sft"], "join": ["profile"], "select": ["join"]}
    before |= {"train": ["select"], "evaluate": ["train"]}
    assert dependencies == {name: {jobs[other] for other in before.get(name, [])} for name in jobs}


def test_join_refuses_while_a_shard_is_missing_and_is_byte_identical_to_one_run(cluster, submit, run, chain):
    cluster.completed(*(f"{chain['profile']}_{shard}" for shard in (0, 2)))
    cluster.wait_for(lambda: cluster.show(chain["join"])["Reason"] == "DependencyNeverSatisfied", 60)
    cluster.command("scancel", *(chain[name] for name in ("join", "select", "train", "evaluate")))
    overrides = (f"run_dir={run}", "profile.num_shards=3")
    early = submit("--job", "join", *overrides)["join"]
    assert cluster.wait(early) == "FAILED" and "shards 1 (" in cluster.log(early) and not (run / "profiles/profiles.jsonl").exists()
    again = ("sbatch", "--parsable", "--array=1", f"--output={run}/slurm/again-%j.log", "slurm/profile.sbatch", *SMOKE, *overrides)
    prefix = ("env", f"PIVOTRL_PYTHON={sys.executable}")
    cluster.completed(f"{cluster.command(*prefix, *again, cwd=REPOSITORY).strip()}_1", f"{chain['alone']}_0")
    cluster.completed(submit("--job", "join", *overrides)["join"])
    alone = run / "alone/profiles/profiles.jsonl"
    assert alone.read_bytes() == (run / "profiles/profiles.jsonl").read_bytes()
    assert len(alone.read_bytes().splitlines()) == 40
