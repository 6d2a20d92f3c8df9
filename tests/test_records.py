import json

import msgspec
import pytest

from pivotrl.records import Journal, completed, file_digest, read_jsonl, write_bytes, write_json, write_jsonl
from pivotrl.types import Action, Message, Profile, Sample, ToolCall

PROFILES = [Profile(candidate_id=f"c{i}", mean=i / 4, samples=(Sample(text="ü\n\u2028", reward=1.0, reason="ok"),)) for i in range(3)]


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "deep" / "profiles.jsonl"
    assert write_jsonl(path, iter(PROFILES)) == 3
    assert read_jsonl(path, Profile) == PROFILES
    assert path.read_bytes().count(b"\n") == 3
    assert list(path.parent.iterdir()) == [path], "no temporary file stays behind"


def test_records_are_frozen_and_checked(tmp_path):
    with pytest.raises(AttributeError):
        PROFILES[0].mean = 1.0
    message = Message(role="assistant", content="a", tool_calls=(ToolCall(name="f", arguments={"x": [1, None]}),))
    assert Action.from_message(message).to_message() == message
    with pytest.raises(msgspec.ValidationError, match="role"):
        msgspec.json.decode(b'{"role": "robot"}', type=Message)


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, PROFILES)
    path.write_bytes(path.read_bytes()[:-5])
    assert read_jsonl(path, Profile) == PROFILES[:2]


@pytest.mark.parametrize("line", [b'{"candidate_id": 5}', b'{"mean": 1}', b"{torn", b"[]"])
def test_any_other_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, PROFILES)
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"a\.jsonl:1 is no valid Profile: "):
        read_jsonl(path, Profile)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_jsonl(tmp_path / "absent.jsonl", Profile)


def test_journal_goes_on_where_it_was_killed(tmp_path):
    path = tmp_path / "new" / "journal.jsonl"
    with Journal(path, Profile) as journal:
        assert journal.records == []
        journal.append(PROFILES[0])
        assert read_jsonl(path, Profile) == PROFILES[:1], "on the disk before the journal is closed"
        journal.append(PROFILES[1])
    path.write_bytes(path.read_bytes() + b'{"candidate_id": "torn", "mea')
    with Journal(path, Profile) as journal:
        assert journal.records == PROFILES[:2]
        journal.append(PROFILES[2])
        assert journal.records == PROFILES
    assert read_jsonl(path, Profile) == PROFILES


def test_records_are_made_once_however_often_it_is_stopped(tmp_path):
    path, made = tmp_path / "profiles.jsonl", []

    def some(done):
        for name in ("c", "b", "a"):  # in another order than asked for
            if name not in done:
                made.append(name)
                yield Profile(candidate_id=name)
                if name == "b":
                    return

    def ask(make):
        return [profile.candidate_id for profile in completed(path, Profile, ["a", "b", "c"], key=lambda p: p.candidate_id, make=make)]

    assert ask(some) == ["b", "c"] and not path.exists(), "asked to leave: what is there, nothing written"
    assert ask(some) == ["a", "b", "c"] and made == ["c", "b", "a"]
    assert ask(lambda done: pytest.fail("all are there")) == ["a", "b", "c"] and list(tmp_path.iterdir()) == [path]


def test_a_journal_left_beside_the_finished_file_goes(tmp_path):
    """Killed between the two."""
    path = tmp_path / "profiles.jsonl"
    write_jsonl(path, [Profile(candidate_id="a")])
    path.with_suffix(".journal.jsonl").write_bytes(b"torn")
    assert [p.candidate_id for p in completed(path, Profile, ["a"], key=lambda p: p.candidate_id, make=lambda done: [])] == ["a"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, PROFILES)

    def broken():
        yield PROFILES[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert read_jsonl(path, Profile) == PROFILES


def test_json_for_people(tmp_path):
    write_json(tmp_path / "a.json", {"b": "ü", "a": [1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "b": "ü"') and json.loads(text) == {"b": "ü", "a": [1]}


def test_digest_depends_on_names_and_bytes_only(tmp_path):
    for folder in ("one", "two"):
        write_bytes(tmp_path / folder / "x" / "a", b"1" * 3_000_000)
        write_bytes(tmp_path / folder / "b", b"2")
    digest = file_digest(tmp_path / "one")
    assert digest == file_digest(tmp_path / "two") and len(digest) == 64
    write_bytes(tmp_path / "two" / "b", b"3")
    assert digest != file_digest(tmp_path / "two")
    write_bytes(tmp_path / "two" / "b", b"2")
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    assert digest != file_digest(tmp_path / "two")
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "absent")
