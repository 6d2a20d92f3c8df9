"""Sampling ahead on a thread: how far, in which order, never across a push, never too old, and how it ends."""

import random
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pivotrl import preemption
from pivotrl.ahead import Ahead, Served

WAIT_S = 10.0


@dataclass
class Client:
    """Knows only how to end: sources that wait for it give up."""

    closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        self.closed.set()


class Source:
    """A group is (step, version). `version` is what the engines hold now; `gates` keep steps from finishing until they are opened."""

    def __init__(self, seconds=lambda step: 0.0):
        self.sampler = type("Sampler", (), {"client": Client()})()
        self.version, self.seconds = 0, seconds
        self.begun: list[int] = []
        self.stored: dict[int, list[tuple[int, int]]] = {}
        self.gates: dict[int, threading.Event] = {}
        self.in_flight = False

    def sample(self, step: int):
        if step in self.stored:
            return self.stored.pop(step)
        self.begun.append(step)
        self.in_flight, version = True, self.version
        time.sleep(self.seconds(step))
        if step in self.gates:
            while not self.gates[step].wait(0.01):
                if self.sampler.client.closed.is_set():
                    raise RuntimeError("the client was closed")
                if preemption.requested():
                    return None
        self.in_flight = False
        return [(step, version)] * 3

    def versions(self, groups):
        return [version for _, version in groups]

    def hold(self, step: int) -> threading.Event:
        return self.gates.setdefault(step, threading.Event())


def make(source, tmp_path: Path, *, k: int, start: int = 0, version: int = 0, end: int = 10, events: list | None = None) -> Ahead:
    def note(*event):
        (events if events is not None else []).append(event)

    source.version = version
    return Ahead(source, served=Served(start, version), end=end, max_staleness=k, run_dir=tmp_path, on_event=note)


def settle(source: Source, count: int) -> list[int]:
    """What has begun, once `count` steps have, and a moment later."""
    deadline = time.monotonic() + WAIT_S
    while len(source.begun) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    return source.begun


def test_without_staleness_a_step_is_sampled_when_it_is_asked_for(tmp_path):
    source = Source()
    with make(source, tmp_path, k=0) as ahead:
        assert settle(source, 0) == []
        assert ahead.take(0).groups == [(0, 0)] * 3 and settle(source, 1) == [0]
        assert ahead.rest(1, now=False)
        source.version, ahead.served = 1, Served(1, 1)
        assert settle(source, 1) == [0] and ahead.take(1).groups == [(1, 1)] * 3


def test_one_step_ahead_and_no_further(tmp_path):
    source = Source()
    gate = source.hold(1)
    with make(source, tmp_path, k=1) as ahead:
        assert ahead.take(0).groups == [(0, 0)] * 3
        assert settle(source, 2) == [0, 1], "step 1 is sampled while step 0 trains, step 2 waits for the push"
        threading.Timer(0.05, gate.set).start()
        assert ahead.rest(1, now=False) and not source.in_flight
        source.version, ahead.served = 1, Served(1, 1)
        assert ahead.take(1).groups == [(1, 0)] * 3 and settle(source, 3) == [0, 1, 2]


def test_nothing_is_sampled_behind_the_last_step(tmp_path):
    source = Source()
    with make(source, tmp_path, k=3, start=7, end=9) as ahead:
        assert ahead.take(7).groups and settle(source, 2) == [7, 8]


def test_further_ahead_neither_waits_while_the_other_is_busy(tmp_path):
    source = Source()
    gate = source.hold(2)
    with make(source, tmp_path, k=3) as ahead:
        ahead.take(0)
        settle(source, 3)
        assert not ahead.rest(1, now=False), "step 1 is there, step 2 is being sampled: train on"
        assert ahead.take(1).groups == [(1, 0)] * 3
        threading.Timer(0.05, gate.set).start()
        assert ahead.rest(2, now=False) and not source.in_flight, "step 2 is needed: wait for it, and push before step 3 begins"
        assert source.begun == [0, 1, 2]
        source.version, ahead.served = 2, Served(2, 2)
        assert [ahead.take(step).groups[0] for step in (2, 3)] == [(2, 0), (3, 2)]


def test_an_evaluation_has_the_engines_for_itself(tmp_path):
    source = Source()
    gate = source.hold(2)
    with make(source, tmp_path, k=3) as ahead:
        ahead.take(0)
        settle(source, 3)
        threading.Timer(0.05, gate.set).start()
        assert ahead.rest(1, now=True) and not source.in_flight and source.begun == [0, 1, 2]


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("seed", range(3))
def test_whatever_takes_how_long_no_rollout_is_too_old_and_no_push_disturbs_one(tmp_path, k, seed):
    """A loop like the trainer's, with random times and dead steps."""
    rng = random.Random(10 * k + seed)
    times = [rng.choice((0.0, 0.002, 0.02)) for _ in range(60)]
    source = Source(lambda step: times[step])
    version, seen = 0, []
    with make(source, tmp_path, k=k, end=30, events=(events := [])) as ahead:
        for step in range(30):
            groups = ahead.take(step).groups
            assert groups[0][0] == step
            seen.append(version - groups[0][1])
            time.sleep(times[30 + step])
            version += rng.random() < 0.8
            if version != source.version:
                if not ahead.rest(step + 1, now=False):
                    continue
                assert not source.in_flight
                source.version = version
            ahead.served = Served(step + 1, version)
    assert source.begun == list(range(30)) and events == []
    assert max(seen) <= k and (k == 0 or max(seen) > 0)


def test_an_error_comes_out_at_its_step_with_its_own_traceback(tmp_path):
    source = Source()
    sample = source.sample
    source.sample = lambda step: sample(step) if step == 0 else failing(step)
    with make(source, tmp_path, k=1) as ahead:
        assert ahead.take(0).groups and ahead.rest(1, now=False), "the step that is done is not lost with it"
        with pytest.raises(OSError, match="step 1") as raised:
            ahead.take(1)
    assert "failing" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]


def failing(step):
    raise OSError(f"step {step}: no servers")


def test_an_error_of_the_main_thread_ends_the_sampling(tmp_path):
    source = Source()
    source.hold(1)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), make(source, tmp_path, k=2) as ahead:
        ahead.take(0)
        settle(source, 2)
        raise ZeroDivisionError
    assert time.monotonic() - began < WAIT_S / 2 and source.sampler.client.closed.is_set() and source.begun == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]


def test_a_run_that_ends_in_peace_leaves_the_client_open(tmp_path):
    source = Source()
    with make(source, tmp_path, k=1, end=2) as ahead:
        assert [ahead.take(0).groups, ahead.rest(1, now=False)][1]
        ahead.served = Served(1, 1)
        ahead.take(1)
    assert not source.sampler.client.closed.is_set()


def test_asked_to_leave_the_source_ends_by_itself_and_keeps_what_it_has(tmp_path, monkeypatch):
    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    source = Source()
    source.hold(1)
    with make(source, tmp_path, k=1) as ahead:
        ahead.take(0)
        settle(source, 2)
        received.append(10)
        assert ahead.take(1).groups is None
    assert not source.sampler.client.closed.is_set(), "its connections would take finished groups with them"


@pytest.mark.parametrize(
    ("k", "start", "step", "version", "stored", "kept"),
    [
        (0, 5, 5, 4, 4, True),  # a synchronous run goes on with the rollouts that it paid for
        (0, 5, 5, 4, 9, True),  # left by a killed run that was further than its checkpoint
        (0, 5, 5, 4, 3, False),  # of an asynchronous run that now goes on synchronously
        (1, 5, 5, 4, 3, True),
        (1, 5, 5, 4, 2, False),
        (1, 5, 6, 4, 4, True),  # step 5 may make one update before step 6 trains
        (1, 5, 6, 4, 3, False),
        (2, 5, 6, 4, 3, True),
    ],
)
def test_rollouts_of_the_run_folder_are_used_unless_too_old(tmp_path, k, start, step, version, stored, kept):
    files = [tmp_path / "rollouts" / f"step_{step:06d}{suffix}" for suffix in (".jsonl", ".journal.jsonl")]
    files[0].parent.mkdir()
    for file in files:
        file.touch()
    source, events = Source(), []
    source.stored[step] = [(step, stored), (step, stored + 5)]
    with make(source, tmp_path, k=k, start=start, version=version, events=events) as ahead:
        found = [ahead.take(number).groups for number in range(start, step + 1)][-1]
    assert (found[0] == (step, stored)) == kept and all(file.exists() == kept for file in files)
    if kept:
        assert events == []
    else:
        assert found == [(step, version)] * 3
        values = {"oldest_version": stored, "policy_version": version, "rollouts": 2, "max_staleness": k}
        assert events == [(step, "stale_rollouts", values)]


def test_engines_that_serve_old_weights_are_not_sampled_from_forever(tmp_path):
    source = Source()
    with make(source, tmp_path, k=1, start=4, version=4) as ahead:
        source.version = 2
        with pytest.raises(RuntimeError, match="step 4: fresh rollouts report policy version 2, but the engines were given 4"):
            ahead.take(4)


def test_other_processes_wait_for_nothing(tmp_path):
    with make(Source(), tmp_path, k=1) as ahead:
        ahead.source = None
        assert ahead.take(3).groups is None and ahead.rest(4, now=True)
