"""Signals to real processes: one flag for all ranks, one exit code, nothing dies before it has saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pivotrl import preemption

ALONE = """
import os, signal, subprocess, sys, time
from pivotrl import preemption
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
@preemption.handled("stage")
def main():
    child = subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(60)"])
    try:
        print(os.getpid(), child.pid, flush=True)
        while True:
            time.sleep(0.01)
            preemption.check("3 of 7 are done")
    finally:
        time.sleep(0.3)
        print("closed; child", child.poll(), flush=True)
        child.kill()
main()
"""
RANKS = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from pivotrl import preemption
dist.init_process_group("gloo")
rank = dist.get_rank()
@preemption.handled("stage")
def main():
    Path(sys.argv[1], f"pid_{rank}").write_text(str(os.getpid()))
    for step in range(10**6):
        time.sleep(0.01)
        if preemption.agreed():
            Path(sys.argv[1], f"saved_{rank}").write_text(str(step))
            if rank == 0:
                time.sleep(1.0)  # as when it stops its servers
                Path(sys.argv[1], "servers_stopped").touch()
            raise preemption.Preempted(f"step {step} is saved")
main()
"""


def wait_for(*paths: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_stage_closes_what_is_open_and_says_that_it_goes_on(number):
    with subprocess.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        own, child = map(int, process.stdout.readline().split())
        assert process.stdout.readline() == "child\n"
        for pid in (child, own) if number == signal.SIGUSR1 else (own,):  # Slurm may send SIGUSR1 to all processes of a step
            os.kill(pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == preemption.SAVED == 85
    assert out == "closed; child None\n", "the signal did not end what the stage had started"
    assert err == "stage: 3 of 7 are done; the same command goes on from there (exit code 85)\n"


def test_ctrl_c_is_as_ever():
    with subprocess.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err


@pytest.mark.parametrize("told", ["one rank", "launcher by SIGTERM", "launcher by SIGUSR1"])
def test_all_ranks_leave_behind_the_same_step(told, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "pivotrl.launch", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        pids = [tmp_path / f"pid_{rank}" for rank in range(2)]
        wait_for(*pids)
        if told == "one rank":
            os.kill(int(pids[1].read_text()), signal.SIGUSR1)
        else:
            process.send_signal(getattr(signal, told.rpartition(" ")[2]))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 85
    assert (tmp_path / "saved_0").read_text() == (tmp_path / "saved_1").read_text()
    assert (tmp_path / "servers_stopped").exists(), "the launcher stops everybody when the first rank ends: they wait for each other"
    assert err.count("goes on from there (exit code 85)") == 1


def test_handlers_and_mask_are_put_back_and_an_old_signal_is_forgotten():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with preemption.handled("stage"):
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested() and preemption.received() == [signal.SIGTERM] and preemption.agreed()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    with preemption.handled("stage"):
        assert not preemption.requested() and not preemption.agreed()
        preemption.check("never said")
    with pytest.raises(preemption.Preempted, match="half is done") as left, preemption.handled("stage"):
        os.kill(os.getpid(), signal.SIGTERM)
        preemption.check("half is done")
    assert left.value.code == 85
    ignored = [signal.signal(number, handler) for number, handler in zip(preemption.SIGNALS, before, strict=True)]
    assert ignored == [signal.SIG_IGN] * 2, "a process on its way out is not ended by a second signal"
    preemption._received.clear()
