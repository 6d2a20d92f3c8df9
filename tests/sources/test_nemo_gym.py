import json
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from pivotrl.candidates import cut
from pivotrl.config import DomainConfig
from pivotrl.sources.nemo_gym import NemoGymSource, from_row, to_row
from pivotrl.types import Action, Candidate, Message, Reject, ToolCall

FIXTURE = Path(__file__).parent.parent / "fixtures" / "nemo_gym.jsonl"
ROWS = [json.loads(line) for line in FIXTURE.read_text().splitlines()]
OUTCOMES = ("expected_action", "expected_answer")


def source(path: Path) -> NemoGymSource:
    return NemoGymSource(DomainConfig(name="gym", source="nemo_gym", verifier="strict", data_path=str(path)))


def candidate_of(row: dict) -> Candidate:
    (candidate,), rejects = cut(from_row(row))
    assert rejects == []
    return candidate


def visible(candidate: Candidate) -> tuple:
    """What a policy sees and an expert does, without ids."""
    plain = [[m.role, m.content, m.reasoning, [(c.name, c.arguments) for c in m.tool_calls]] for m in candidate.history]
    expert = candidate.expert
    return plain, expert.content, [(c.name, c.arguments) for c in expert.tool_calls]


def test_items_become_messages():
    trajectory = from_row(ROWS[0], domain="gym")
    assert (trajectory.id, trajectory.task_id, trajectory.domain) == ("books-1", "books-1", "gym")
    calls = (ToolCall(name="stock", arguments={"title": "Emma"}, id="c1"), ToolCall(name="price", arguments={"title": "Emma"}, id="c2"))
    assert trajectory.messages == (
        Message(role="system", content="Sell books."),
        Message(role="user", content="Is Emma in stock?"),
        Message(role="assistant", content="One moment.", reasoning="Check. Twice.", tool_calls=calls),
        Message(role="tool", content="3", tool_call_id="c1"),
        Message(role="tool", content="9.5", tool_call_id="c2"),
        Message(role="assistant", content="Three, at 9.50.", reasoning="Tell them."),
    )
    candidates, _ = cut(trajectory)
    assert [c.id for c in candidates] == ["books-1:1"]  # the earlier turn belongs to another row
    assert all("Tell them." not in message.reasoning for message in candidates[0].history)


def test_batches_text_input_and_terminal_rows():
    batch = candidate_of(ROWS[1])
    assert [call.arguments for call in batch.expert.tool_calls] == [{"cmd": "ls"}, {"cmd": "pwd"}]
    assert [message.role for message in batch.history] == ["system", "user"]
    assert json.loads(candidate_of(ROWS[2]).expert.content) == {"keystrokes": "ls\n"}


@pytest.mark.parametrize("row", ROWS[:3])
def test_round_trip_keeps_the_row(row: dict):
    back = to_row(candidate_of(row), from_row(row).tools, mean=None)
    assert {key: back[key] for key in row} == row


@pytest.mark.parametrize("row", ROWS[:3])
def test_round_trip_through_messages_alone(row: dict):
    candidate = candidate_of(row)
    bare = msgspec.structs.replace(candidate, state={})
    again = to_row(bare, from_row(row).tools)
    assert visible(candidate_of(again)) == visible(candidate)
    assert from_row(again).tools == tuple({**t, "function": {"strict": False, **t["function"]}} for t in from_row(row).tools)


def test_a_candidate_of_another_domain_as_a_row():
    history = (Message(role="user", content="q"), Message(role="assistant", content="a"), Message(role="user", content="r"))
    expert = Action(tool_calls=(ToolCall(name="f", arguments={"x": "ä"}),))
    candidate = Candidate(id="t:1", trajectory_id="t", task_id="t", domain="d", turn=1, history=history, expert=expert)
    assert to_row(candidate, [{"type": "function", "function": {"name": "f"}}], mean=0.5) == {
        "responses_create_params": {
            "input": [
                {"type": "message", "role": "user", "content": "q"},
                {"type": "message", "role": "assistant", "content": "a"},
                {"type": "message", "role": "user", "content": "r"},
            ],
            "tools": [{"type": "function", "name": "f", "strict": False}],
            "parallel_tool_calls": False,
            "tool_choice": "auto",
        },
        "expected_action": {"type": "function_call", "name": "f", "arguments": '{"x": "ä"}'},
        "trajectory_id": "t",
        "meta_info": {"turn": 2, "step": 0, "assistant_depth": 1},
        "pass_rate": 0.5,
    }


def test_other_rows_are_rejects():
    gym = source(FIXTURE)
    answers = [ref if isinstance(ref, Reject) else gym.read(ref.key) for ref in gym.refs()]
    assert [(a.where, a.reason) for a in answers if isinstance(a, Reject)] == [
        ("nemo_gym.jsonl:4", "no_expected_action"),
        ("nemo_gym.jsonl:5", "missing_input"),
        ("nemo_gym.jsonl:6", "tool_answer_without_call"),
        ("nemo_gym.jsonl:7", "broken_arguments"),
        ("nemo_gym.jsonl:8", "unknown_item"),
        ("nemo_gym.jsonl:9", "dangling_reasoning"),
    ]


def test_published_rows_round_trip(shared_data: Path):
    folder = shared_data / "nemo_gym_examples" / "verbatim"
    gym, reasons, kinds = source(folder), Counter(), Counter()
    for ref in gym.refs():
        if isinstance(ref, Reject):
            reasons[ref.reason] += 1
            continue
        name, _, number = ref.key.rpartition(":")
        row = json.loads((folder / name).read_text().split("\n")[int(number) - 1])
        back = to_row(candidate_of(row), from_row(row).tools)
        assert back["responses_create_params"] == row["responses_create_params"]
        assert [back.get(key) for key in OUTCOMES] == [row.get(key) for key in OUTCOMES]
        bare = msgspec.structs.replace(candidate_of(row), state={})
        assert visible(candidate_of(to_row(bare, from_row(row).tools))) == visible(candidate_of(row))
        kinds["expected_answer" if row.get("expected_answer") else row["expected_action"]["type"]] += 1
    assert kinds == {"function_call": 18, "message": 7, "function_call_batch": 5, "expected_answer": 10}
    assert reasons == {"no_expected_action": 336, "missing_input": 20, "not_json": 10}
