"""Strict verification: the expert's action and nothing else."""

import pytest

from pivotrl.config import DomainConfig
from pivotrl.types import Action, Candidate, ToolCall
from pivotrl.verifiers import build_verifier


def calls(*pairs: tuple[str, dict]) -> Action:
    return Action(tool_calls=tuple(ToolCall(name=name, arguments=arguments) for name, arguments in pairs))


def reward(expert: Action, action: Action) -> float:
    candidate = Candidate(id="c", trajectory_id="t", task_id="t", domain="d", turn=0, history=(), expert=expert)
    [verdict] = build_verifier("strict", DomainConfig(name="d")).verify(candidate, [action])
    assert verdict.status == "ok" and verdict.reason
    return verdict.reward


BOOK = ("book", {"seats": 2, "names": ["A b"], "window": True})


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (calls(("book", {"window": True, "names": ["A b"], "seats": 2})), 1.0),
        (calls(("book", {"seats": 2.0, "names": ["A b"], "window": True})), 1.0),
        (calls(("book", {"seats": "2", "names": ["A b"], "window": True})), 0.0),
        (calls(("book", {"seats": 2, "names": ["A b"], "window": 1})), 0.0),
        (calls(("book", {"seats": 2, "names": ["a b"], "window": True})), 0.0),
        (calls(("book", {"seats": 2, "names": ["A b"]})), 0.0),
        (calls(("book", {**BOOK[1], "extra": None})), 0.0),
        (calls(("Book", BOOK[1])), 0.0),
        (calls(BOOK, BOOK), 0.0),
        (Action(content="booked"), 0.0),
        (Action(malformed="no JSON"), 0.0),
        (Action(tool_calls=calls(BOOK).tool_calls, malformed="two blocks"), 0.0),
    ],
)
def test_one_call(action: Action, expected: float):
    assert reward(calls(BOOK), action) == expected


def test_order_of_calls_counts():
    other = ("look", {})
    assert reward(calls(BOOK, other), calls(BOOK, other)) == 1.0
    assert reward(calls(BOOK, other), calls(other, BOOK)) == 0.0


def test_messages_are_compared_stripped():
    assert reward(Action(content="Hello "), Action(content="\nHello", reasoning="free")) == 1.0
    assert reward(Action(content="Hello"), Action(content="hello")) == 0.0
    assert reward(Action(content=""), Action(malformed="empty")) == 0.0


def test_one_verdict_per_action_in_order():
    candidate = Candidate(id="c", trajectory_id="t", task_id="t", domain="d", turn=0, history=(), expert=calls(BOOK))
    actions = [calls(BOOK), Action(content="x"), calls(BOOK)]
    verdicts = build_verifier("strict", DomainConfig(name="d")).verify(candidate, actions)
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 1.0]
