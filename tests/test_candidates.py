import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivotrl.candidates import assign_splits, cut, extract, load_tools, tools_key
from pivotrl.config import DomainConfig
from pivotrl.records import read_jsonl
from pivotrl.types import Action, Candidate, Message, Reject, TaskRef, ToolCall, Trajectory

FILES = ("trajectories.jsonl", "candidates.jsonl", "heldout.jsonl", "tools.json", "rejects.jsonl")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def domain(heldout=2, warmup=3, train=None) -> DomainConfig:
    return DomainConfig(name="toy", source="x", verifier="x", num_heldout_tasks=heldout, num_warmup_tasks=warmup, num_train_tasks=train)


def splits(refs, sizes: DomainConfig, seed=0) -> dict[str, str]:
    return {ref.task_id: ref.split for ref in assign_splits(refs, sizes, seed=seed)}


def refs_of(num_tasks: int) -> list[TaskRef]:
    return [TaskRef(key=f"{task}.{copy}", task_id=f"task {task}") for task in range(num_tasks) for copy in range(2)]


def test_tasks_are_handed_out_in_hash_order():
    order = sorted((f"task {n}" for n in range(10)), key=lambda t: hashlib.sha256(f"7:{t}".encode()).hexdigest())
    got = splits(refs_of(10), domain(train=4), seed=7)
    assert got == dict.fromkeys(order[:2], "heldout") | dict.fromkeys(order[2:5], "warmup") | dict.fromkeys(order[5:9], "train")


def test_all_refs_of_a_task_share_its_split_and_keep_their_order():
    refs = refs_of(10)
    got = assign_splits(refs, domain(), seed=0)
    assert [ref.key for ref in got] == [ref.key for ref in refs]
    assert len({(ref.task_id, ref.split) for ref in got}) == 10


def test_preassigned_heldout_tasks_stay_and_surplus_ones_are_never_trained_on():
    refs = refs_of(6) + [TaskRef(key=f"h{n}", task_id=f"held {n}", split="heldout") for n in range(4)]
    more = splits(refs, domain(heldout=5, warmup=0))
    assert all(more[f"held {n}"] == "heldout" for n in range(4))
    assert sorted(more.values()).count("heldout") == 5
    fewer = splits(refs, domain(heldout=3, warmup=0))
    held = [task for task, split in fewer.items() if split == "heldout"]
    assert len(held) == 3 and all(task.startswith("held") for task in held)
    assert sum(task.startswith("held") for task in fewer) == 3


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 300), min_size=1, max_size=40), st.integers(0, 300), st.integers(0, 5), st.integers(0, 5), st.integers(0, 20))
def test_splits_are_stable(tasks, new, heldout, warmup, train):
    refs = [TaskRef(key=str(n), task_id=str(n)) for n in sorted(tasks)]
    before = splits(refs, domain(heldout, warmup, train))
    grown = splits(refs, domain(heldout, warmup, train + 3))
    assert before.items() <= grown.items()
    after = splits([*refs, TaskRef(key=f"{new}", task_id=str(new))], domain(heldout, warmup, train))
    rank = {"heldout": 0, "warmup": 1, "train": 2, None: 3}
    moved = [(before[t], after.get(t)) for t in before if before[t] != after.get(t)]
    assert all(rank[a] + 1 <= rank[b] for a, b in moved)
    assert len(moved) == len(set(moved)) <= 3


def look(id="c", name="look") -> Message:
    return Message(role="assistant", reasoning="hm", tool_calls=(ToolCall(name=name, id=id),))


def episode(number: int, *middle: Message, **fields) -> Trajectory:
    messages = (Message(role="user", content=f"q{number}"), look(), Message(role="tool", content="seen", tool_call_id="c"), *middle)
    messages += (Message(role="assistant", content="done"),)
    return Trajectory(id=f"e{number}", task_id=f"t{number}", domain="toy", messages=messages, tools=(TOOL,), **fields)


def test_every_assistant_turn_becomes_a_candidate():
    trajectory = episode(1)
    candidates, rejects = cut(trajectory)
    assert rejects == []
    assert [c.id for c in candidates] == ["e1:0", "e1:1"]
    first, second = candidates
    assert first.history == trajectory.messages[:1] and second.history == trajectory.messages[:3]
    assert first.expert == Action(reasoning="hm", tool_calls=(ToolCall(name="look", id="c"),))
    assert first.future == (Action(content="done"),) and second.future == ()
    assert second.history[1].reasoning == "hm"  # past reasoning stays; the chat template decides
    assert first.tools == tools_key([TOOL]) and len(first.tools) == 16


def test_unusable_turns_are_rejected_by_reason():
    middle = (look(name="fly"), Message(role="assistant", content=" "))
    candidates, rejects = cut(episode(1, *middle))
    assert [c.turn for c in candidates] == [0, 3]
    assert [(r.where, r.reason) for r in rejects] == [("e1:1", "unknown_tool"), ("e1:2", "empty_action")]
    greeting = Trajectory(id="g", task_id="g", domain="toy", messages=(Message(role="assistant", content="Hello"),))
    assert [r.reason for r in cut(greeting)[1]] == ["empty_history"]
    toolless = Trajectory(id="n", task_id="n", domain="toy", messages=(Message(role="user", content="q"), look(name="any")))
    assert len(cut(toolless)[0]) == 1  # without schemas there is nothing to check a name against


def test_state_can_restrict_turns():
    assert [c.turn for c in cut(episode(1, state={"only_last_turn": True}))[0]] == [1]
    candidates, rejects = cut(episode(1, state={"skip_turns": {"0": "query_failed"}}))
    assert [c.turn for c in candidates] == [1]
    assert [(r.where, r.reason) for r in rejects] == [("e1:0", "query_failed")]


class ToySource:
    """Twelve episodes of ten tasks, one of them a failure; dies when it has read `die_after`."""

    def __init__(self, die_after=None):
        self.die_after, self.num_reads = die_after, 0

    def refs(self):
        return [*(TaskRef(key=str(n), task_id=f"t{n % 10}") for n in range(12)), Reject(where="line 13", reason="not_json")]

    def read(self, key):
        if self.num_reads == self.die_after:
            raise KeyboardInterrupt
        self.num_reads += 1
        return Reject(where=key, reason="episode_failed") if key == "3" else episode(int(key))


def test_extract_counts_and_files(tmp_path: Path):
    sizes = domain(heldout=0, warmup=0)
    counts = extract(ToySource(), sizes, folder=tmp_path, seed=0)
    assert counts == {
        "trajectories": 11,
        "warmup_trajectories": 0,
        "train_trajectories": 11,
        "heldout_trajectories": 0,
        "candidates": 22,
        "heldout_candidates": 0,
        "rejects": {"episode_failed": 1, "not_json": 1},
    }
    candidates = read_jsonl(tmp_path / "candidates.jsonl", Candidate)
    tools = load_tools(tmp_path)
    assert len(candidates) == 22 and all(tools[c.tools] == [TOOL] for c in candidates)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_splits_do_not_share_tasks(tmp_path: Path):
    extract(ToySource(), domain(), folder=tmp_path, seed=0)
    trajectories = read_jsonl(tmp_path / "trajectories.jsonl", Trajectory)
    tasks = {split: {t.task_id for t in trajectories if t.split == split} for split in ("heldout", "warmup", "train")}
    assert not tasks["heldout"] & tasks["train"] and not tasks["warmup"] & tasks["train"]
    assert {c.task_id for c in read_jsonl(tmp_path / "candidates.jsonl", Candidate)} == tasks["train"]
    assert {c.task_id for c in read_jsonl(tmp_path / "heldout.jsonl", Candidate)} == tasks["heldout"]


@pytest.mark.parametrize("torn", [0, 1, 40])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, torn: int):
    extract(ToySource(), domain(), folder=tmp_path / "whole", seed=0)
    with pytest.raises(KeyboardInterrupt):
        extract(ToySource(die_after=5), domain(), folder=tmp_path / "torn", seed=0)
    journal = tmp_path / "torn" / "read.journal.jsonl"
    journal.write_bytes(journal.read_bytes()[: -torn or None])
    resumed = ToySource()
    extract(resumed, domain(), folder=tmp_path / "torn", seed=0)
    assert resumed.num_reads == (7 if torn == 0 else 8)  # twelve in all, one read again when its line was torn
    for name in FILES:
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_candidates_is_an_error_that_counts_the_rejects(tmp_path: Path):
    with pytest.raises(ValueError, match="no train candidates from 1 trajectories.*episode_failed 1, not_json 1"):
        source = ToySource()
        source.refs = lambda: [TaskRef(key="1", task_id="t1"), TaskRef(key="3", task_id="t3"), Reject(where="x", reason="not_json")]
        extract(source, domain(heldout=2), folder=tmp_path, seed=0)
    assert len(read_jsonl(tmp_path / "rejects.jsonl", Reject)) == 2


def test_only_a_source_that_makes_its_runs_can_be_careless(tmp_path: Path):
    sizes = domain()
    sizes.warmup_overlooked = 0.5
    with pytest.raises(ValueError, match="reads recorded runs; set it to 0"):
        extract(ToySource(), sizes, folder=tmp_path, seed=0)


def test_equal_ids_are_rejected_once_seen(tmp_path: Path):
    source = ToySource()
    source.read = lambda key: episode(1)
    counts = extract(source, domain(0, 0), folder=tmp_path, seed=0)
    assert counts["candidates"] == 2 and counts["rejects"]["duplicate_id"] == 22


def test_tools_key_ignores_the_order_of_keys():
    assert tools_key([TOOL]) == tools_key([json.loads(json.dumps(TOOL, sort_keys=True))]) != tools_key([])


def test_load_tools_names_the_missing_stage(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="extract_candidates"):
        load_tools(tmp_path)
