"""One real Slurm for all tests of this folder, which are skipped where it is not installed, and the jobs that they share.

The machine may be small, and a job of the smoke experiment mostly starts programs: what does not depend on each other runs at once.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import REPOSITORY, SMOKE, Cluster, missing  # noqa: E402

SHARDS = 3


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if absent := missing():
        pytest.skip(f"Slurm is not installed: no {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path may have 107 characters
    folder.chmod(0o755)
    running = Cluster(folder)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def launch(cluster) -> Callable[..., subprocess.CompletedProcess]:
    """tools/launch.py as a user calls it, with the smoke experiment on this cluster."""

    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/launch.py", *SMOKE, *arguments]
        return subprocess.run(command, cwd=REPOSITORY, env=cluster.environment, capture_output=True, text=True, timeout=120)

    return call


@pytest.fixture(scope="session")
def submit(launch) -> Callable[..., dict[str, str]]:
    """Submits jobs with tools/launch.py and gives their ids by name."""

    def call(*arguments: str) -> dict[str, str]:
        submitted = launch("--submit", *arguments)
        assert submitted.returncode == 0, submitted.stderr
        return dict(re.findall(r"^(\w+) (\d+)$", submitted.stdout, flags=re.MULTILINE))

    return call


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("chain") / "run"


@pytest.fixture(scope="session")
def chain(cluster, submit, run) -> dict[str, str]:
    """The whole chain, of which the warm-up is over and task 1 of the profiling array was killed; `alone` profiles without shards."""
    jobs = submit(f"run_dir={run}", f"profile.num_shards={SHARDS}")
    cluster.completed(jobs["sft"])
    whole = (f"run_dir={run}/alone", f"candidates_path={run}/candidates", f"model.hf_path={run}/hf/sft")
    jobs["alone"] = submit("--job", "profile", *whole)["profile"]
    victim = f"{jobs['profile']}_1"
    begun = run / "profiles_shards/00001-of-00003/manifest.json"
    cluster.wait_for(lambda: cluster.state(victim) == "RUNNING" and begun.exists(), 120)
    cluster.command("scancel", "--signal=KILL", "--full", victim)
    assert cluster.wait(victim) in ("FAILED", "CANCELLED")
    return jobs


@pytest.fixture(scope="session")
def inputs(cluster, submit, run, chain) -> list[str]:
    """Overrides with which training in a run folder of its own starts from the chain's warmed-up policy and its pivots."""
    given = [f"candidates_path={run}/candidates", f"model.hf_path={run}/hf/sft"]
    cluster.completed(f"{chain['alone']}_0")
    cluster.completed(submit("--job", "select", f"run_dir={run}/alone", *given)["select"])
    return [*given, f"pivots_path={run}/alone/pivots"]
