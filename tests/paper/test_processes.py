"""Children end when asked, when told, and when the program that started them is killed; a folder has one user at a time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pivotrl.paper.processes import Child, LaneServer, Lock

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
PARENT = """
import sys, time
from pathlib import Path
from pivotrl.paper.processes import Child, Lock
lock = Lock(Path(sys.argv[1]))
lock.take()
child = Child([sys.executable, "-c", sys.argv[2]], Path(sys.argv[1]) / "log", held=[lock.descriptor])
print(child.process.pid, flush=True)
time.sleep(600)
"""


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def test_a_child_runs_to_its_end_and_logs(tmp_path):
    child = Child([sys.executable, "-c", "import sys; print('out'); sys.exit(3)"], tmp_path / "logs" / "x.log")
    assert child.wait(60) == 3 and (tmp_path / "logs" / "x.log").read_text() == "out\n"
    child.close()


def test_a_stubborn_child_is_killed_with_all_below_it(tmp_path):
    nested = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); {STUBBORN}"
    child = Child([sys.executable, "-c", nested], tmp_path / "log")
    wait_for(lambda: (tmp_path / "log").read_text().count("up") == 2)
    (below,) = psutil.Process(child.process.pid).children()
    child.close(grace_s=0.2)
    assert child.code == -signal.SIGKILL
    wait_for(lambda: not below.is_running() or below.status() == psutil.STATUS_ZOMBIE)


def test_what_a_killed_program_started_ends_and_frees_its_folder(tmp_path):
    lock = Lock(tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), STUBBORN], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    with pytest.raises(ValueError, match="in use by another comparison"):
        lock.take(seconds=0.3)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    lock.take(seconds=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the lock is free only when the child is gone"
    lock.release()


SERVER = """
import sys, time
from pathlib import Path
options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
if "broken" in options:
    sys.exit("no model")
folder = Path(options["run_dir"]) / "servers" / sys.argv[2]
folder.mkdir(parents=True)
(folder / "0_0.url").write_text("http://x")
print(sys.argv[1:], flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A lane's server whose program only pretends."""
    monkeypatch.setattr("pivotrl.paper.processes.ROOT", tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "serve_rollouts.py").write_text(SERVER)
    made = LaneServer(3, tmp_path, ["experiment=paper"])
    yield made
    made.close()


def test_a_server_that_has_died_is_started_again_under_another_name(server):
    server.start()
    first = server.override()
    wait_for(server.ready)
    server.start()
    assert server.override() == first and Path(first.removeprefix("rollout.urls=[")).parent.name.startswith("lane_3_")
    server._child.process.kill()
    server._child.wait(60)
    server.start()
    assert server.override() != first, "the dead one's address still lies there"
    wait_for(server.ready)
    wait_for(lambda: server.log.read_text().count("'experiment=paper'") == 2)


def test_a_server_that_cannot_start_is_an_error(server):
    server.overrides = ("broken=1",)
    server.start()
    server._child.wait(60)
    with pytest.raises(RuntimeError, match="server of lane 3 ended before it answered"):
        server.ready()
