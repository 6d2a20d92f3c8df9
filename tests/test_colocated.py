"""Turns on shared GPUs: servers and policy never at the same time, nothing twice, and nothing at all where they share none."""

import pytest

from pivotrl.colocated import Turns


class Shared:
    """Policy and service in one; memory that both want must never be wanted twice."""

    def __init__(self):
        self.notes: list[str] = []
        self.awake, self.resident = True, True

    def offload(self):
        self.notes += ["offload"] * self.resident
        self.resident = False

    def reload(self):
        assert not self.awake, "both would be on the GPU"
        self.notes += ["reload"] * (not self.resident)
        self.resident = True

    def sleep(self):
        self.notes.append("sleep")
        self.awake = False

    def wake(self):
        assert not self.resident, "both would be on the GPU"
        self.notes.append("wake")
        self.awake = True


@pytest.fixture
def shared() -> Shared:
    return Shared()


def test_turns_alternate_and_are_taken_once(shared):
    turns = Turns(shared, shared, shared=True)
    for _ in range(2):
        turns.sample()
        turns.sample()
        turns.train()
        turns.train()
    assert shared.notes == ["offload", "sleep", "reload", "offload", "wake", "sleep", "reload"]


def test_a_push_wakes_the_servers_itself(shared):
    turns = Turns(shared, shared, shared=True)
    turns.train()
    turns.sample(pushing=True)
    shared.awake = True  # by the push
    turns.sample()
    assert shared.notes == ["sleep", "offload"]
    turns.train()
    assert shared.notes == ["sleep", "offload", "sleep", "reload"]


def test_other_processes_only_make_room(shared):
    turns, shared.awake = Turns(shared, None, shared=True), False
    turns.sample()
    turns.train()
    assert shared.notes == ["offload", "reload"]


def test_where_nothing_is_shared_nothing_happens(shared):
    turns = Turns(shared, shared, shared=False)
    turns.train()
    turns.sample()
    assert shared.notes == []
