"""Runs a comparison's jobs in a few lanes side by side, each lane with one rollout server that stays up for all of its runs.

What is done is not done again, what was killed goes on: recipes see to that, so the runner keeps no state but the folders.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from pivotrl import preemption
from pivotrl.paper.cells import SAMPLING, Comparison, Job
from pivotrl.paper.processes import POLL_S, STOP_GRACE_S, Child, LaneServer, Lock
from pivotrl.pipeline import RECIPES_DIR
from pivotrl.recipe import compose
from pivotrl.records import write_json
from pivotrl.stages import open_stage


@dataclass(frozen=True)
class Failure:
    """A job that did not get done: why, and the log that tells more."""

    job: str
    reason: str
    log: Path


class Board:
    """Which jobs wait, run and are over; shared by the lanes. `changed` guards everything."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = list(jobs)
        self.waiting = list(jobs)
        self.running: set[str] = set()
        self.done: set[str] = set()
        self.failures: list[Failure] = []
        self.stopping = False
        self.changed = threading.Condition()

    def take(self) -> Job | None:
        """The next job whose needs are done, as soon as there is one; None when there will be none."""
        with self.changed:
            while self.waiting and not self.stopping:
                self._drop_hopeless()
                ready = next((job for job in self.waiting if self.done.issuperset(job.needs)), None)
                if ready is not None:
                    self.waiting.remove(ready)
                    self.running.add(ready.name)
                    return ready
                if not self.running:
                    break
                self.changed.wait(POLL_S)
            return None

    def _drop_hopeless(self) -> None:
        failed = {failure.job: failure for failure in self.failures}
        for job in list(self.waiting):
            if causes := [failed[name] for name in job.needs if name in failed]:
                self.waiting.remove(job)
                self.failures.append(Failure(job.name, f"not begun: it needs {causes[0].job}", causes[0].log))

    def put(self, job: Job, failure: Failure | None) -> None:
        """A lane has finished a job, or left it because it was told to stop."""
        with self.changed:
            self.running.discard(job.name)
            if failure is not None:
                self.failures.append(failure)
            elif not self.stopping:
                self.done.add(job.name)
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopping = True
            self.changed.notify_all()


class Clock:
    """How long stages took, and from that how long the rest will take."""

    def __init__(self, jobs: Sequence[Job], lanes: int):
        self.started = time.monotonic()
        self.lanes = lanes
        self._open = [(job.kind, stage, job.name) for job in jobs for stage, _ in job.stages]  # a job may have a stage twice
        self._seconds: dict[tuple[str, str], list[float]] = {}
        self._lock = threading.Lock()

    def finished(self, job: Job, stage: str, seconds: float | None) -> None:
        """A stage is over; None when there was nothing to do."""
        with self._lock:
            self._open.remove((job.kind, stage, job.name))
            if seconds is not None:
                self._seconds.setdefault((job.kind, stage), []).append(seconds)

    def left(self) -> float | None:
        """Seconds until all is done, by the mean of the same stage of the same kind of job, of the same stage, or of all stages."""
        with self._lock:
            every = [seconds for found in self._seconds.values() for seconds in found]
            if not every:
                return None
            total = 0.0
            for kind, stage, _ in self._open:
                same = [seconds for (_, name), found in self._seconds.items() if name == stage for seconds in found]
                found = self._seconds.get((kind, stage)) or same or every
                total += sum(found) / len(found)
        return total / self.lanes

    def __str__(self) -> str:
        left = self.left()
        return f"{self.spent()} elapsed, ETA {'?' if left is None else tqdm.format_interval(left)}"

    def spent(self) -> str:
        return tqdm.format_interval(time.monotonic() - self.started)


class Runner:
    """`Runner(comparison, lanes=2).run()`: True when everything is done."""

    def __init__(self, comparison: Comparison, *, lanes: int):
        if lanes < 1:
            raise ValueError(f"--lanes {lanes}: at least 1 is needed")
        self.comparison = comparison
        jobs = comparison.jobs()
        self.board, self.clock, self.lock = Board(jobs), Clock(jobs, lanes), Lock(comparison.root)
        served = (f"experiment={comparison.experiment}", f"model.hf_path={comparison.folders.pi_0}", *comparison.overrides)
        self.servers = [LaneServer(index, comparison.root, served) for index in range(lanes)]
        self._composing = threading.Lock()  # Hydra composes one configuration at a time
        self._signals: list[int] = []  # a list, since a handler may not wait for a lock

    def run(self) -> bool:
        """Run what is not done. Ctrl-C and SIGTERM stop all stages and servers, and the same command goes on from there.

        Raises:
            ValueError: another comparison works in the folder.
            SystemExit: asked to stop; with code 85 when everything begun was saved.
            hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException: an override names no field.
        """
        comparison = self.comparison
        compose(*comparison.jobs()[0].stages[0][1])  # a typo fails here, before anything starts
        self.lock.take()
        handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            write_json(comparison.root / "paper.json", _described(comparison))
            with ThreadPoolExecutor(len(self.servers), thread_name_prefix="lane") as pool:
                lanes = [pool.submit(self._lane, server) for server in self.servers]
                while not all(lane.done() for lane in lanes):
                    time.sleep(POLL_S)
                    if self._signals:
                        self.board.stop()
            for lane in lanes:
                lane.result()
        finally:
            for server in self.servers:
                server.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.lock.release()
        if self._signals:
            print(f"paper: stopped after {self.clock.spent()}; the same command goes on from there", file=sys.stderr)
            sys.exit(preemption.SAVED)
        return not self.board.failures

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _lane(self, server: LaneServer) -> None:
        try:
            while (job := self.board.take()) is not None:
                failure = self._work(job, server)
                self.board.put(job, failure)
                if failure is not None:
                    print(f"FAILED {job.name}: {failure.reason}; see {failure.log}", file=sys.stderr, flush=True)
        except BaseException:
            self.board.stop()  # a fault of ours: the other lanes must not wait for this one
            raise

    def _work(self, job: Job, server: LaneServer) -> Failure | None:
        """All stages of a job that are not done; None also when told to stop."""
        log = self.comparison.root / "logs" / f"{job.name.replace('/', '_')}.log"
        for number, (stage, overrides) in enumerate(job.stages, start=1):
            try:
                seconds = None if self._is_done(stage, overrides) else self._make(stage, overrides, server, log)
            except (ValueError, FileNotFoundError, RuntimeError, OmegaConfBaseException) as error:
                return Failure(job.name, f"{stage}: {error}", log)
            if self.board.stopping:
                return None
            self.clock.finished(job, stage, seconds)
            self._tell(job, stage, seconds, last=number == len(job.stages))
        return None

    def _make(self, stage: str, overrides: Sequence[str], server: LaneServer, log: Path) -> float:
        """Run a stage; the seconds it took. What it returns when told to stop says nothing.

        Raises:
            RuntimeError: it failed, or the lane's server did not start.
        """
        attached: tuple[str, ...] = ()
        if stage in SAMPLING:
            server.start()
            while not server.ready() and not self.board.stopping:
                time.sleep(POLL_S)
            attached = (server.override(),)
        if self.board.stopping:
            return 0.0
        started = time.monotonic()
        code = self._call(stage, (*overrides, *attached), log)
        seconds = time.monotonic() - started
        if code and not self.board.stopping:
            raise RuntimeError(f"exit code {code} after {seconds:.0f} s")
        return seconds

    def _is_done(self, stage: str, overrides: Sequence[str]) -> bool:
        """Whether a stage's output is there, so that no process need be started to learn it."""
        with self._composing:
            config = compose(*overrides)
        return open_stage(stage, config, writes=False).done

    def _call(self, stage: str, overrides: Sequence[str], log: Path) -> int:
        """Run a recipe to its end; its exit code."""
        command = [sys.executable, str(RECIPES_DIR / f"{stage}.py"), *overrides]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            file.write(f"\n== {' '.join(command)}\n")
        child = Child(command, log, held=(self.lock.descriptor,))
        try:
            while (code := child.wait(POLL_S)) is None:
                if self.board.stopping:
                    child.terminate()
                    code = child.wait(STOP_GRACE_S)
                    return -1 if code is None else code
        finally:
            child.close(grace_s=0.0)
        return code

    def _tell(self, job: Job, stage: str, seconds: float | None, *, last: bool) -> None:
        with self.board.changed:
            done = len(self.board.done) + int(last)
        took = "already done" if seconds is None else f"{seconds:.0f} s"
        print(f"[{done}/{len(self.board.jobs)}] {job.name} {stage}: {took} ({self.clock})", flush=True)


def _described(comparison: Comparison) -> dict[str, Any]:
    """What the report needs to know: the seeds of every cell that was ever asked for in the folder.

    Raises:
        ValueError: the folder belongs to another experiment, or other overrides.
    """
    path, fixed = comparison.root / "paper.json", {"experiment": comparison.experiment, "overrides": list(comparison.overrides)}
    before = json.loads(path.read_bytes()) if path.exists() else fixed | {"cells": {}}
    if changed := [f"{name} {before[name]} -> {value}" for name, value in fixed.items() if before[name] != value]:
        raise ValueError(f"{comparison.root} holds a comparison made otherwise ({'; '.join(changed)}): give another --folder")
    asked = {cell.name: sorted({*before["cells"].get(cell.name, ()), *comparison.seeds_of(cell)}) for cell in comparison.cells}
    return fixed | {"cells": before["cells"] | asked}
