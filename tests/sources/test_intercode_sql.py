import gzip
import json
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from pivotrl.candidates import cut
from pivotrl.config import DomainConfig
from pivotrl.environments.sql import EXECUTE_SQL, SqlEnvironment
from pivotrl.sources.intercode_sql import InterCodeSqlSource, convert_dump
from pivotrl.types import Action, Message, TaskRef, Trajectory

DUMP = Path(__file__).parent.parent / "fixtures" / "mysql_dump.sql"
GOLD = "SELECT title FROM film WHERE year > 2000"
FILMS = ["SELECT title FROM films", "SHOW TABLES", "SELECT title FROM film WHERE year >= 2001"]


def episode(number: int, actions: list[str], reward: float) -> dict:
    """One entry of an InterCode result file."""
    observations = ["Error executing query: Table 'cinema.films' doesn't exist" if "films" in action else "[...]" for action in actions]
    history = {"actions": actions, "observations": observations, "rewards": [0.0] * (len(actions) - 1) + [reward]}
    return {"task_id": number, "query": f"question {number}", "turn_history": history}


EPISODES = {
    "0": episode(0, FILMS, 1.0),
    "1": episode(1, FILMS[-1:], 1.0),
    "2": episode(2, FILMS, 0.5),
    "3": episode(3, ["SELECT title FROM film"], 1.0),
    "4": episode(4, ["SELECT x FROM nothing"], 1.0),
    "5": {"task_id": 0},
}
TASKS = [{"db": "cinema", "gold": GOLD}, {"db": "cinema", "gold": GOLD.lower() + " ;"}, {"db": "cinema", "gold": GOLD}]
TASKS += [{"db": "cinema", "gold": GOLD}, {"db": "Empty", "gold": "SELECT x FROM nothing"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    convert_dump(DUMP, tmp_path / "sqlite")
    (tmp_path / "ic_sql_toy.json").write_text(json.dumps(EPISODES))
    (tmp_path / "ic_spider_dev.json").write_text(json.dumps(TASKS))
    return tmp_path


def config(folder: Path | None) -> DomainConfig:
    return DomainConfig(name="sql", source="intercode_sql", verifier="sql", environment="sql", data_path=folder and str(folder))


def test_the_dump_becomes_sqlite(folder: Path):
    connection = sqlite3.connect(folder / "sqlite" / "cinema.sqlite")
    assert connection.execute("SELECT * FROM film ORDER BY id").fetchall() == [
        (1, "It's (not) `here`;", 1999, 0.5),
        (2, 'Two "lines"\nof text', 2001, None),
        (3, "C:\\", 2020, 1.25),
    ]
    assert sorted(path.name for path in (folder / "sqlite").iterdir()) == ["Empty.sqlite", "cinema.sqlite"]


def test_upstream_episodes(folder: Path):
    source = InterCodeSqlSource(config(folder))
    first, second, failed, wrong, empty, broken = source.refs()
    assert isinstance(first, TaskRef) and first.task_id == second.task_id == wrong.task_id  # one gold query, asked twice
    assert [(r.where, r.reason) for r in (failed, empty, broken)] == [
        ("ic_sql_toy.json:2", "episode_failed"),
        ("ic_sql_toy.json:4", "empty_database"),
        ("ic_sql_toy.json:5", "missing_fields"),
    ]
    assert source.read(wrong.key).reason == "not_reproduced"
    trajectory = source.read(first.key)
    assert trajectory.messages[0] == Message(role="user", content="question 0") and trajectory.tools == (EXECUTE_SQL,)
    assert [m.role for m in trajectory.messages] == ["user"] + ["assistant", "tool"] * 3
    assert trajectory.state == {"db": "cinema", "gold_sql": GOLD, "question": "question 0", "skip_turns": {"0": "expert_query_failed"}}
    candidates, rejects = cut(trajectory)
    assert [c.turn for c in candidates] == [1, 2] and [r.reason for r in rejects] == ["expert_query_failed"]


def test_chat_files_instead(folder: Path):
    messages = [
        {"role": "system", "content": "SQL only."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"id": "c0", "function": {"name": "execute_sql", "arguments": json.dumps({"query": GOLD})}}]},
    ]
    rows = [{"id": "a", "task_id": 7, "db": "cinema", "gold_sql": GOLD, "success": True, "messages": messages}]
    rows += [{"id": "b", "db": "cinema"}, rows[0] | {"messages": [{"role": "robot"}]}]
    (folder / "ic_sql_toy.json").unlink()
    with gzip.open(folder / "run.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + "{")
    source = InterCodeSqlSource(config(folder))
    good, missing, role, torn = source.refs()
    assert [missing.reason, source.read(role.key).reason, torn.reason] == ["missing_fields", "unknown_role", "not_json"]
    state = source.read(good.key).state
    assert state["system"] == "SQL only."
    assert [m.role for m in SqlEnvironment(config(folder), state).reset()] == ["system", "user"]


def test_missing_files_are_named(folder: Path):
    with pytest.raises(ValueError, match="set domain.data_path"):
        InterCodeSqlSource(config(None))
    (folder / "sqlite" / "cinema.sqlite").unlink()
    with pytest.raises(FileNotFoundError, match="cinema.sqlite does not exist"):
        InterCodeSqlSource(config(folder))
    (folder / "ic_spider_dev.json").unlink()
    with pytest.raises(FileNotFoundError, match="ic_spider_dev.json"):
        InterCodeSqlSource(config(folder))


def test_a_dump_that_sqlite_refuses_is_named(tmp_path: Path):
    (tmp_path / "dump.sql").write_text("USE `d`;\nINSERT INTO `nowhere` VALUES (1);\n")
    with pytest.raises(ValueError, match="database d: no such table: nowhere"):
        convert_dump(tmp_path / "dump.sql", tmp_path / "out")


def test_real_episodes(shared_data: Path, read_all):
    domain = config(shared_data / "intercode_sql")
    counts, trajectories = read_all(InterCodeSqlSource(domain))
    replayed = sum((_replay(domain, trajectory) for trajectory in trajectories), Counter())
    assert counts["episode_failed"] == 272 and counts["empty_database"] == 62
    assert counts["trajectories"] + counts["not_reproduced"] == 700 and counts["trajectories"] > 640
    assert set(counts) == {"episode_failed", "empty_database", "not_reproduced", "expert_query_failed", "trajectories", "candidates"}
    assert replayed["solved"] == counts["trajectories"]
    assert replayed["same look-up"] > 0.97 * replayed["look-up"]


def _replay(domain: DomainConfig, trajectory: Trajectory) -> Counter:
    """The episode played again in our environment, look-ups compared with what MySQL answered."""
    world, counts, done = SqlEnvironment(domain, trajectory.state), Counter(), False
    world.reset()
    for message, recorded in zip(trajectory.messages[1::2], trajectory.messages[2::2], strict=True):
        (answer,), done = world.step(Action.from_message(message))
        if message.tool_calls[0].arguments["query"].upper().startswith(("SHOW", "DESC")):
            counts["look-up"] += 1  # SQLite does not know which keys MySQL counts up by itself
            counts["same look-up"] += answer.content == recorded.content.replace("auto_increment", "")
    counts["solved"] += done and world.reward() == 1.0
    return counts
