import gzip
import shutil
from pathlib import Path

import pytest

from pivotrl.candidates import cut
from pivotrl.config import DomainConfig
from pivotrl.sources.openai_chat import OpenAIChatSource
from pivotrl.types import Message, Reject, TaskRef, ToolCall

FIXTURE = Path(__file__).parent.parent / "fixtures" / "chat.jsonl"


def source(path) -> OpenAIChatSource:
    return OpenAIChatSource(DomainConfig(name="chat", source="openai_chat", verifier="strict", data_path=path and str(path)))


def test_good_lines():
    chat = source(FIXTURE)
    first, second, third = (ref for ref in chat.refs()[:3] if isinstance(ref, TaskRef))
    assert (first.key, first.task_id, second.task_id) == ("chat.jsonl:1", "weather", "weather")
    trajectory = chat.read(first.key)
    assert (trajectory.id, trajectory.task_id, trajectory.reward, trajectory.domain) == ("weather-1", "weather", 1.0, "chat")
    assert trajectory.messages == (
        Message(role="system", content="Be brief."),
        Message(role="user", content="Weather in Oslo?"),
        Message(role="assistant", reasoning="Look it up.", tool_calls=(ToolCall(name="forecast", arguments={"city": "Oslo"}, id="a"),)),
        Message(role="tool", content="rain", tool_call_id="a"),
        Message(role="assistant", content="Rain."),
    )
    legacy = chat.read(second.key)
    assert legacy.id == "weather-2"
    assert legacy.messages[2].role == "tool" and legacy.messages[2].tool_call_id == legacy.messages[1].tool_calls[0].id == "call_1"
    assert legacy.tools == ({"type": "function", "function": {"name": "forecast"}},)
    candidates, rejects = cut(legacy)
    assert [c.turn for c in candidates] == [0] and [r.reason for r in rejects] == ["empty_action", "unknown_tool"]
    greeting = chat.read(third.key)
    assert greeting.id == "chat.jsonl:3" and len(greeting.task_id) == 16
    assert [c.turn for c in cut(greeting)[0]] == [1]


def test_bad_lines_are_rejects_with_place_and_reason():
    chat = source(FIXTURE)
    rejects = [ref for ref in chat.refs() if isinstance(ref, Reject)]
    rejects += [answer for ref in chat.refs() if isinstance(ref, TaskRef) and isinstance(answer := chat.read(ref.key), Reject)]
    assert {reject.where: reject.reason for reject in rejects} == {
        "chat.jsonl:5": "episode_failed",
        "chat.jsonl:6": "not_json",
        "chat.jsonl:7": "missing_messages",
        "chat.jsonl:8": "unknown_role",
        "chat.jsonl:9": "broken_arguments",
        "chat.jsonl:10": "tool_answer_without_call",
        "chat.jsonl:11": "non_text_content",
        "chat.jsonl:12": "malformed_tool_call",
        "chat.jsonl:13": "malformed_tools",
    }
    assert len(rejects) == 9


@pytest.mark.parametrize(
    "line",
    ["[]", '"x"', '{"messages": [1]}', '{"messages": [{"role": ["user"]}]}', '{"messages": [{"role": "user", "content": 3}]}', "\\ud800",
     '{"messages": [{"role": "user"}], "reward": "high"}', '{"messages": [{"role": "user"}], "state": 1}', '{"messages": [{}], "id": {}}',
     '{"messages": [{"role": "user"}, {"role": "assistant", "tool_calls": {"a": 1}}]}',
     '{"messages": [{"role": "user"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]}'],
)  # fmt: skip
def test_no_line_is_fatal(tmp_path: Path, line: str):
    (tmp_path / "a.jsonl").write_text(line)
    chat = source(tmp_path)
    (ref,) = chat.refs()
    answer = ref if isinstance(ref, Reject) else chat.read(ref.key)
    assert isinstance(answer, Reject) and answer.reason


def test_folder_and_gzip_give_the_same(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep" / "chat.jsonl.gz", "wb") as file:
        file.write(FIXTURE.read_bytes())
    shutil.copy(FIXTURE, tmp_path / "a.jsonl")
    chat = source(tmp_path)
    assert [ref.key for ref in chat.refs() if isinstance(ref, TaskRef)][:1] == ["a.jsonl:1"]
    assert chat.read("deep/chat.jsonl.gz:1") == chat.read("a.jsonl:1")


def test_a_wrong_path_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no .jsonl"):
        source(tmp_path)
    with pytest.raises(ValueError, match="set domain.data_path"):
        source(None)
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        source(tmp_path)


def test_one_prompt_is_one_task(tmp_path: Path):
    line = '{"messages": [{"role": "system", "content": "%s"}, {"role": "user", "content": "same"}, {"role": "assistant"}]}\n'
    (tmp_path / "a.jsonl").write_text(line % "a" + line % "b")
    first, second = source(tmp_path).refs()
    assert first.task_id == second.task_id and first.key != second.key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tau_bench_airline_gpt4o", {"episode_failed": 116, "trajectories": 84, "candidates": 829}),
        ("swe_agent_demos", {"episode_failed": 1, "trajectories": 21, "candidates": 225}),
    ],
)
def test_real_transcripts(shared_data: Path, read_all, name: str, expected: dict[str, int]):
    counts, _ = read_all(source(shared_data / name))
    assert counts == expected


def test_a_dataset_is_read_like_a_file(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"id": "a", "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "1"}]},
        {"id": "b", "messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "2"}], "reward": 1.0},
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list([dict.fromkeys(rows[1]) | row for row in rows]).to_parquet(folder / "train.parquet")
    source = OpenAIChatSource(DomainConfig(name="chat", source="openai_chat", verifier="strict", data_path=f"hf://{folder}"))
    read = [source.read(ref.key) for ref in source.refs()]
    assert [(t.id, t.messages[1].content, t.reward) for t in read] == [("a", "1", None), ("b", "2", 1.0)]
