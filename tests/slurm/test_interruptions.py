"""Training on a real Slurm that is disturbed in mid-run: asked to leave as before a time limit, and its rollout server killed.

Three runs over two nodes start at once with the same seed: one is left alone, and tells what the weights of the others must be.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from cluster import OVER  # noqa: E402

from pivotrl import metrics  # noqa: E402
from pivotrl.records import read_jsonl  # noqa: E402
from pivotrl.run_folder import RunFolder  # noqa: E402
from pivotrl.types import Group  # noqa: E402

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1800)]

STEPS = 6
# one request at a time, so that a signal meets a step half sampled; no checkpoint but at the end and when asked to leave
SLOW = (
    f"algorithm.num_steps={STEPS}",
    "algorithm.pivots_per_step=8",
    "rollout.max_inflight=1",
    "domain.verifier_workers=0",
    "algorithm.checkpoint_every=100",
)
APART = ("cluster.rollout_nodes=1", "cluster.network_rollout=true")


@dataclass
class Run:
    """A training job, its folder, and what was noted when it was disturbed."""

    job: str
    path: Path
    noted: dict[str, Any] = field(default_factory=dict)

    def journal(self, step: int) -> Path:
        return self.path / f"rollouts/step_{step:06d}.journal.jsonl"

    def groups(self, step: int) -> list[Group]:
        return read_jsonl(self.finished(step), Group)

    def stages(self) -> dict[str, dict]:
        return RunFolder(self.path).manifest() or {"train_grpo": {"status": "not started"}}

    def sampling(self, step: int) -> bool:
        """Whether the step has its first groups, or (should nobody have looked meanwhile) all of them."""
        return (self.journal(step).exists() and self.journal(step).stat().st_size > 0) or self.finished(step).exists()

    def finished(self, step: int) -> Path:
        return self.path / f"rollouts/step_{step:06d}.jsonl"

    def weights(self):
        (file,) = (self.path / "hf/final").glob("*.safetensors")
        return load_file(file)


@pytest.fixture(scope="module")
def runs(cluster, submit, run, inputs) -> dict[str, Run]:
    """All three, running, the disturbed ones just disturbed."""
    found = {}
    for name, options in (("asked", ()), ("apart", APART), ("whole", ())):
        path = run / name
        found[name] = Run(submit("--job", "train", f"run_dir={path}", *inputs, *SLOW, *options)["train"], path)
    asked, apart = found["asked"], found["apart"]

    def ask():
        after = ("--output=/dev/null", "--wrap=true", f"--dependency=afterok:{asked.job}")
        asked.noted["after"] = cluster.command("sbatch", "--parsable", *after).strip()
        cluster.command("scancel", "--signal=USR1", asked.job)  # to the steps, as --signal=USR1@SECONDS does

    def has_left() -> bool:
        left = asked.stages()["train_grpo"]["status"] == "preempted" and cluster.state(asked.job) == "PENDING"
        return left and not cluster.processes(asked.job)

    def start_again():
        note_what_was_left(cluster, asked)
        # not now: nodes refuse a job in the very second in which they ended it ("Job credential revoked")
        cluster.command("scontrol", "update", f"JobId={asked.job}", "StartTime=now+3")

    def kill():
        (url,) = apart.path.glob("servers/*/0_0.url")
        apart.noted["url"] = url.read_text()
        (server,) = (p for p in psutil.process_iter() if is_server(p, port=apart.noted["url"].rpartition(":")[2]))
        server.kill()

    when(cluster, (asked, lambda: asked.sampling(2), ask), (asked, has_left, start_again), (apart, lambda: apart.sampling(2), kill))
    return found


def note_what_was_left(cluster, run: Run) -> None:
    steps = len(metrics.read(run.path, "train_grpo"))
    run.noted |= {
        "stages": run.stages(),
        "steps": steps,
        "checkpoint": (run.path / "checkpoints/grpo/latest").read_text(),
        "paid": read_jsonl(run.journal(steps), Group) if run.journal(steps).exists() else [],  # else the signal came behind sampling
        "log": cluster.log(run.job),
        "waits": cluster.show(run.noted["after"])["Reason"],
    }


def when(cluster, *planned: tuple[Run, Callable[[], bool], Callable[[], None]]) -> None:
    """Do each thing at the first moment at which it is due."""
    waiting, looked = list(planned), time.monotonic()
    while waiting:
        for item in list(waiting):
            _, due, act = item
            if due():
                act()
                waiting.remove(item)
        if time.monotonic() - looked > 5:
            looked = time.monotonic()
            ended = [run for run, *_ in waiting if cluster.state(run.job) in OVER]
            assert not ended, cluster.log(ended[0].job)[-4000:]
        time.sleep(0.05)


def is_server(process: psutil.Process, *, port: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return "vllm.entrypoints.openai.api_server" in words and port in words


def expect_same(found: Run, expected: Run) -> None:
    """All samples with their logprobs and verdicts, and the bits of the final weights."""
    for step in range(STEPS):
        assert found.groups(step) == expected.groups(step), step
    ours, theirs = found.weights(), expected.weights()
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []


def test_asked_to_leave_it_saves_is_requeued_and_ends_with_the_weights_of_an_undisturbed_run(cluster, runs):
    asked = runs["asked"]
    left = asked.noted
    assert left["stages"]["train_grpo"]["status"] == "preempted" and "export_hf" not in left["stages"]
    assert left["checkpoint"] == f"step_{left['steps']:06d}" and 2 <= left["steps"] < STEPS
    assert set(re.findall(r"Exited with exit code (\d+)", left["log"])) == {"85"} and "Traceback" not in left["log"], "on both nodes"
    assert left["log"].count("the same command goes on from there (exit code 85)") == 1
    assert left["waits"] == "Dependency", "what comes behind it in a chain waits on"

    cluster.completed(asked.job, left["after"], runs["whole"].job)
    assert cluster.show(asked.job)["Restarts"] == "1" and asked.stages()["train_grpo"]["status"] == "done"
    assert [row["step"] for row in metrics.read(asked.path, "train_grpo")] == list(range(STEPS)), "no step twice, none left out"
    assert all(group in asked.groups(left["steps"]) for group in left["paid"]), "what was sampled before is not sampled again"
    assert not list(asked.path.glob("rollouts/*.journal.jsonl"))
    expect_same(asked, runs["whole"])


def test_a_server_killed_on_its_own_node_comes_back_at_a_new_address(cluster, runs):
    apart, whole = runs["apart"], runs["whole"]
    cluster.completed(apart.job)
    assert cluster.show(apart.job)["NumNodes"] == "3" and not list(apart.path.glob("servers/*/*.url"))
    (log,) = apart.path.glob("servers/*/logs_0/server_0.log")
    assert log.read_text(errors="replace").count("--- starting on port") >= 2, "more where a port was taken meanwhile"
    assert not (apart.path / "logs/server_0.log").exists(), "training started no server of its own"

    (down,) = metrics.events(apart.path, "train_grpo", "server_down")
    (up,) = metrics.events(apart.path, "train_grpo", "server_up")
    assert down["url"] == apart.noted["url"] != up["url"] and down["step"] <= up["step"] < STEPS
    rows = metrics.read(apart.path, "train_grpo")
    assert [row["step"] for row in rows] == list(range(STEPS))
    versions = [0, *(row["policy_version"] for row in rows)]
    current = {f"policy version {version} verified" for version in versions[up["step"] : up["step"] + 2]}  # before or behind its update
    assert up["why"] in current and versions[-1] > versions[up["step"]]
    for step in range(STEPS):
        served = {r.completion.policy_version for group in apart.groups(step) for r in group.rollouts}
        assert served == {versions[step]}, "as the server itself reports it"
    assert metrics.events(apart.path, "train_grpo", "servers")[-1]["servers"][0]["url"] == up["url"]
    stages = apart.stages()
    assert stages["export_hf"]["status"] == "done" and stages["train_grpo"]["config"]["algorithm"]["num_steps"] == STEPS
    cluster.completed(whole.job)
    expect_same(apart, whole)
