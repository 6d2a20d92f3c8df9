"""A process that makes no progress says where it hangs and ends, so that the launcher ends the others.

Stages call `beat` at every step, phase and finished group; a thread compares the last beat with watchdog.timeout_s.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pivotrl.config import WatchdogConfig

HUNG = 86
MAX_INTERVAL_S = 10.0

_running: list["Watchdog"] = []


def beat(phase: str | None = None) -> None:
    """Progress: this process now begins `phase`, or goes on with the present one. Does nothing where no watchdog runs.

    It costs less than a microsecond, so a loop's body may call it.
    """
    for watchdog in _running:
        watchdog.hear(phase or watchdog.heard[1])


@contextmanager
def waiting(phase: str) -> Iterator[None]:
    """Around a wait for another process, whose own watchdog sees to it: no time limit here meanwhile."""
    for watchdog in _running:
        watchdog.hear(phase, limited=False)
    try:
        yield
    finally:
        beat(phase)


@contextmanager
def watching(options: WatchdogConfig, run_dir: Path, *, rank: int = 0) -> Iterator[None]:
    """Watch this process while the context is open; with watchdog.timeout_s=0 nothing happens.

    Raises:
        ValueError: watchdog.timeout_s is negative.
    """
    if options.timeout_s < 0:
        raise ValueError(f"watchdog.timeout_s={options.timeout_s}: give seconds above 0, or 0 for no watchdog")
    if not options.timeout_s:
        yield
        return
    watchdog = Watchdog(options.timeout_s, run_dir / "logs" / f"rank_{rank}.stacks", rank)
    _running.append(watchdog)
    watchdog.start()
    try:
        yield
    finally:
        _running.remove(watchdog)
        watchdog.stop()


class Watchdog(threading.Thread):
    """The thread of one process. `stacks` is where it writes when the process hangs; removed again when it never did."""

    def __init__(self, timeout_s: float, stacks: Path, rank: int):
        super().__init__(name="watchdog", daemon=True)
        self.timeout_s, self.stacks, self.rank = timeout_s, stacks, rank
        self.heard = (time.monotonic(), "start", True)
        self.ended = threading.Event()
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(stacks, "w")  # noqa: SIM115 - open as long as the thread runs: a hung process may be unable to

    def hear(self, phase: str, *, limited: bool = True) -> None:
        self.heard = (time.monotonic(), phase, limited)  # one assignment, so the thread sees all of it or nothing

    def run(self) -> None:
        interval_s = min(self.timeout_s / 4, MAX_INTERVAL_S)
        while True:
            # Where code holds the interpreter's lock forever this thread stands still too: C's own timer then ends the process.
            faulthandler.dump_traceback_later(self.timeout_s + 2 * interval_s, exit=True, file=self.file)
            if self.ended.wait(interval_s):
                return
            since, phase, limited = self.heard
            silent_s = time.monotonic() - since
            if limited and silent_s > self.timeout_s:
                self.end(phase, silent_s)

    def end(self, phase: str, silent_s: float) -> None:
        """Write all threads' stacks and one sentence, and end the process without asking it."""
        for file in (self.file, sys.__stderr__):
            faulthandler.dump_traceback(file=file, all_threads=True)
        sentence = (
            f"watchdog: rank {self.rank} made no progress for {silent_s:.0f} s (watchdog.timeout_s={self.timeout_s:g}) in {phase}; "
            f"the stacks of its threads are in {self.stacks}; exit code {HUNG}\n"
        )
        for file in (self.file, sys.__stderr__):
            file.write(sentence)
            file.flush()
        os._exit(HUNG)

    def stop(self) -> None:
        self.ended.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        if not self.stacks.stat().st_size:
            self.stacks.unlink()
