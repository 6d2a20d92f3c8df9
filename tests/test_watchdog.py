"""Real hangs in real processes: in a collective under the launcher, and in code that holds the interpreter's lock."""

import os
import subprocess
import sys
import time

import pytest

from pivotrl import watchdog
from pivotrl.config import WatchdogConfig
from pivotrl.watchdog import HUNG, beat, waiting, watching

COLLECTIVE = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist
from pivotrl import preemption, watchdog
from pivotrl.config import WatchdogConfig
dist.init_process_group("gloo")
def falls_asleep():
    time.sleep(600)
@preemption.handled("stage")
def main():
    with watchdog.watching(WatchdogConfig(timeout_s=2.0), Path(sys.argv[1]), rank=dist.get_rank()):
        for step in range(30):
            watchdog.beat(f"step {step}, update")
            time.sleep(0.1)
            if step == 29 and dist.get_rank() == 1:
                falls_asleep()
            dist.all_reduce(torch.zeros(1))
main()
"""
HOLDS_THE_LOCK = """
import ctypes, sys
from pathlib import Path
from pivotrl import watchdog
from pivotrl.config import WatchdogConfig
def never_lets_go():
    ctypes.PyDLL(None).sleep(600)
with watchdog.watching(WatchdogConfig(timeout_s=1.0), Path(sys.argv[1])):
    never_lets_go()
"""


def run(*command: str) -> tuple[subprocess.CompletedProcess, float]:
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=90, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return ended, time.monotonic() - started


def test_a_rank_that_sleeps_before_a_collective_ends_the_run(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(COLLECTIVE)
    ended, seconds = run("-m", "pivotrl.launch", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path))
    assert ended.returncode == HUNG == 86, ended.stderr[-3000:]
    assert seconds < 45, "it slept for 600 s"
    stacks = (tmp_path / "logs" / "rank_1.stacks").read_text()
    assert "falls_asleep" in stacks and "watchdog: rank 1 made no progress for" in stacks
    assert "(watchdog.timeout_s=2) in step 29, update" in stacks and "exit code 86" in stacks
    assert "falls_asleep" in ended.stderr and "rank 1 made no progress" in ended.stderr
    waits = (tmp_path / "logs" / "rank_0.stacks").read_text()
    assert "all_reduce" in waits and "falls_asleep" not in waits


def test_code_that_holds_the_interpreters_lock_is_found_too(tmp_path):
    ended, seconds = run("-c", HOLDS_THE_LOCK, str(tmp_path))
    assert ended.returncode == 1 and seconds < 30
    assert "never_lets_go" in (tmp_path / "logs" / "rank_0.stacks").read_text()


@pytest.fixture
def hung(monkeypatch) -> list[str]:
    """The phases in which this process was found to hang, instead of its end."""
    found: list[str] = []

    def end(self, phase, silent_s):
        found.append(phase)
        self.hear(phase)

    monkeypatch.setattr(watchdog.Watchdog, "end", end)
    return found


def test_beats_keep_it_quiet_and_silence_does_not(hung, tmp_path):
    with watching(WatchdogConfig(timeout_s=1.0), tmp_path, rank=3):
        beat("update")
        for _ in range(16):  # as for each microbatch of a long update
            time.sleep(0.1)
            beat()
        assert hung == [] and watchdog._running[0].heard[1] == "update"
        beat("idle")
        time.sleep(2.0)
        assert hung and set(hung) == {"idle"}
    assert not (tmp_path / "logs" / "rank_3.stacks").exists(), "nothing was written"


def test_waiting_for_another_process_has_no_limit_here(hung, tmp_path):
    with watching(WatchdogConfig(timeout_s=0.2), tmp_path):
        with waiting("rollouts of the main process"):
            time.sleep(0.8)
        assert hung == []
        time.sleep(0.6)
    assert set(hung) == {"rollouts of the main process"}, "the limit holds again behind the wait"


def test_no_watchdog_by_zero_and_none_by_less(tmp_path):
    with watching(WatchdogConfig(timeout_s=0), tmp_path):
        beat("anything")
    assert not (tmp_path / "logs").exists() and not watchdog._running
    with pytest.raises(ValueError, match=r"watchdog.timeout_s=-1.0: give seconds above 0, or 0"), watching(WatchdogConfig(-1.0), tmp_path):
        pass
