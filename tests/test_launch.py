"""What the launcher makes of its workers' ends, on one node and on two; signals are tested with preemption."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pivotrl.launch import OTHERS_S, exit_code


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ({0: 85, 1: 85}, 85),
        ({1: 85}, 85),
        ({0: 85, 1: 86}, 86),
        ({1: 1, 0: 85}, 1),
        ({0: -9}, 137),
        ({0: -15, 1: 86}, 86),
        ({0: -15, 1: 85}, 85),
        ({0: -15, 1: -15}, 143),
    ],
)
def test_one_code_for_all_ranks(codes, expected):
    assert exit_code(codes) == expected


@pytest.mark.parametrize("code", [0, 7, 85])
def test_the_exit_code_is_the_workers(code, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(f"import os, sys; assert os.environ['WORLD_SIZE'] == '1'; sys.exit({code})")
    command = [sys.executable, "-m", "pivotrl.launch", "--standalone", "--nproc-per-node", "1", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code, ended.stderr[-2000:]


NODES = """
import sys, time
import torch.distributed as dist
from pivotrl import preemption
how, seconds = sys.argv[1], float(sys.argv[2])
dist.init_process_group("gloo")
@preemption.handled("stage")
def leave():
    raise preemption.Preempted("all is saved")
try:
    leave() if how == "saves" else sys.exit(int(how))
finally:
    time.sleep(seconds)
"""


def two_nodes(script: Path, first: Sequence[str], second: Sequence[str]) -> list[tuple[int, str]]:
    """(exit code, errors) of two launchers that meet on this machine; the first one holds the rendezvous store."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script.write_text(NODES)
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint=localhost:{port}"]
    launchers = []
    for arguments in (first, second):
        command = [sys.executable, "-m", "pivotrl.launch", *meeting, str(script), *arguments]
        launchers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        deadline = time.monotonic() + 60
        while len(launchers) == 1 and not listens(port):
            assert time.monotonic() < deadline and launchers[0].poll() is None
            time.sleep(0.05)
    errors = [launcher.communicate(timeout=90)[1] for launcher in launchers]
    return [(launcher.returncode, text) for launcher, text in zip(launchers, errors, strict=True)]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


@pytest.mark.parametrize("late", [0, 1])
def test_every_node_says_that_its_ranks_saved_whichever_ends_first(late, tmp_path):
    """Agents look after their workers ten times a second; the other node's ranks need longer to end."""
    ends = two_nodes(tmp_path / "node.py", *(("saves", "1.5" if node == late else "0") for node in range(2)))
    assert [code for code, _ in ends] == [85, 85], ends
    assert not any("Traceback" in errors for _, errors in ends)


def test_a_failure_elsewhere_is_one_sentence_and_no_waiting(tmp_path):
    started = time.monotonic()
    (code, _), (other, errors) = two_nodes(tmp_path / "node.py", ("7", "0"), ("saves", "600"))
    assert (code, other) == (7, 1)
    assert "launch: another node's launcher, which holds the rendezvous, has ended" in errors and "Traceback" not in errors
    assert time.monotonic() - started < OTHERS_S
