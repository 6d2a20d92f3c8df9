"""Sampling ahead: steps are sampled in their order on one thread while the policy trains, as far ahead as algorithm.max_staleness allows.

Weights change only while nothing is in flight. So with max_staleness 1 step t + 1 is sampled beside update t, by the weights from before
that update; with 0 a step is sampled when the trainer asks for it. docs/asynchronous.md draws it.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from pivotrl import preemption
from pivotrl.config import AlgorithmConfig
from pivotrl.groups import GroupSource


def check(algorithm: AlgorithmConfig, *, colocated: bool) -> None:
    """Raises ValueError for settings under which stale rollouts would do harm, or never come."""
    given = f"algorithm.max_staleness={algorithm.max_staleness}"
    if algorithm.max_staleness < 0:
        raise ValueError(f"{given}: 0 samples with the present policy, 1 or more so many steps ahead")
    if algorithm.max_staleness and algorithm.importance_cap is None:
        raise ValueError(f"{given} needs algorithm.importance_cap (5.0, say): rollouts of an older policy are not corrected without it")
    if algorithm.max_staleness and colocated:
        raise ValueError(
            f"{given} with rollout.colocated=true: engines that sleep while the policy trains cannot sample then; set one of them"
        )


class Served(NamedTuple):
    """What the rollout engines hold: the policy as it is before `step`, which is `version`."""

    step: int
    version: int


class Sampled(NamedTuple):
    """A step's groups, None where the process was asked to leave, and the seconds that sampling them took."""

    groups: Sequence[Any] | None
    seconds: float


class Ahead:
    """The sampling of one training run, from `served.step` up to step `end`; a context manager.

    On processes without a source every method does nothing. `on_event(step, name, values)` is called from the thread.
    """

    def __init__(
        self,
        source: GroupSource | None,
        *,
        served: Served,
        end: int,
        max_staleness: int,
        run_dir: Path,
        on_event: Callable[[int, str, dict[str, Any]], None],
    ):
        self.source, self.served, self.end, self.max_staleness = source, served, end, max_staleness
        self.run_dir, self.on_event = run_dir, on_event
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="rollouts")  # one: steps are sampled one after the other
        self._futures: dict[int, Future[Sampled]] = {}
        self._next = served.step

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the thread. Sampling nobody waits for any more ends by itself when this process was asked to leave, else by force."""
        sampling = [future for future in self._futures.values() if not future.cancel() and not future.done()]
        if sampling and self.source is not None and not preemption.requested():
            self.source.sampler.client.close()  # cancels the requests in flight, and with them what waits for their answers
        self._threads.shutdown(cancel_futures=True)

    def take(self, step: int) -> Sampled:
        """Wait for `step`, which only the first caller gets; all further steps that may be sampled by now begin behind it.

        Raises:
            Whatever the source raised for this step, with the thread's own traceback.
        """
        if self.source is None:
            return Sampled(None, 0.0)
        while self._next < self.end and self._next <= self.served.step + self.max_staleness:
            self._futures[self._next] = self._threads.submit(self._sample, self._next, self.served)
            self._next += 1
        return self._futures.pop(step).result()

    def rest(self, step: int, *, now: bool) -> bool:
        """Wait for `step`, and give up the steps behind it that have not begun; True when nothing is in flight any more.

        Unless it must be `now`: False at once while later steps are sampled although the rollouts of `step` are there, since nobody
        waits then. That comes with max_staleness 2 or more only.
        """
        ready = step in self._futures and self._futures[step].done()
        if ready and not now and not all(future.done() for future in self._futures.values()):
            return False
        for later in sorted(self._futures, reverse=True):
            if later > step and self._futures[later].cancel():
                del self._futures[later]
                self._next = later
        wait(self._futures.values())  # a failure is raised by the `take` of its step
        return True

    def _sample(self, step: int, served: Served) -> Sampled:
        """On the thread: the step's groups, sampled anew if those of the run folder are older than allowed."""
        assert self.source is not None
        began = time.perf_counter()
        # Each step in between makes one update at most, so no policy newer than this will train on these rollouts.
        oldest_allowed = served.version + step - served.step - self.max_staleness
        groups = self.source.sample(step)
        if self._oldest(groups, oldest_allowed) < oldest_allowed:
            self._discard(step, groups, served)
            groups = self.source.sample(step)
            if (oldest := self._oldest(groups, oldest_allowed)) < oldest_allowed:
                raise RuntimeError(
                    f"step {step}: fresh rollouts report policy version {oldest}, but the engines were given {served.version}: a rollout "
                    "server serves other weights than it was sent"
                )
        return Sampled(groups, time.perf_counter() - began)

    def _oldest(self, groups: Sequence[Any] | None, default: int) -> int:
        assert self.source is not None
        return default if groups is None else min(self.source.versions(groups), default=default)

    def _discard(self, step: int, groups: Sequence[Any] | None, served: Served) -> None:
        assert self.source is not None and groups is not None
        versions = self.source.versions(groups)
        values = {"oldest_version": min(versions), "policy_version": served.version, "rollouts": len(versions)}
        self.on_event(step, "stale_rollouts", values | {"max_staleness": self.max_staleness})
        for suffix in (".jsonl", ".journal.jsonl"):
            (self.run_dir / "rollouts" / f"step_{step:06d}{suffix}").unlink(missing_ok=True)
