"""InterCode-SQL: recorded episodes of a model that answers Spider questions by SQL, with InterCode's own reward.

The data is public: github princeton-nlp/intercode at commit c3e46d827cfc9d4c704ec078f7abf9f41e3191d8 (MIT; the questions and
databases are Spider's, CC BY-SA 4.0). `domain.data_path` is a folder that you fill from a checkout of it:

    data/results/sql/gpt-4/ic_sql_multiturn_gpt-4_10_turns.json   (or any other ic_sql_*.json beside it)
    data/sql/spider/ic_spider_dev.json
    sqlite/<database>.sqlite     one per database: `python -m pivotrl.sources.intercode_sql data/sql/spider/ic_spider_dbs.sql
                                 <data_path>/sqlite` makes them from the MySQL dump in the same repository

Instead of the two JSON files the folder may hold *.jsonl or *.jsonl.gz: the same episodes as chat messages, with the fields
id, task_id, db, gold_sql, success and messages.
"""

import hashlib
import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from pivotrl.config import DomainConfig
from pivotrl.environments.sql import EXECUTE_SQL, MAX_OBSERVATION_CHARS, Database, QueryFailed, call_fault, mismatch
from pivotrl.sources.openai_chat import Malformed, decode_object, jsonl_lines, parse_messages
from pivotrl.types import Message, Reject, TaskRef, Trajectory

_FIELDS = ("id", "db", "gold_sql", "success", "messages")


class InterCodeSqlSource:
    """Solved episodes whose last query finds the gold rows here too. Keys are places in the files.

    A task is a database and a gold query: Spider asks most questions twice in other words, and the two must share a split.

    Raises:
        ValueError: domain.data_path is not set.
        FileNotFoundError: it does not exist or holds no episodes.
    """

    def __init__(self, domain: DomainConfig):
        self._domain = domain
        self._rows: dict[str, dict[str, Any] | Reject] = {}
        upstream = sorted(Path(domain.data_path).glob("ic_sql_*.json")) if domain.data_path else []
        for where, row in _upstream_rows(upstream) if upstream else _chat_rows(domain):
            self._rows[where] = row
        self._empty = {db: self._is_empty(db) for db in sorted({row["db"] for row in self._rows.values() if isinstance(row, dict)})}

    def _is_empty(self, name: str) -> bool:
        with closing(Database(self._domain, name, time_limit_s=self._domain.verifier_timeout_s)) as database:
            return not any(database.run(f'SELECT 1 FROM "{table}" LIMIT 1').rows for table in database.schema)

    def refs(self) -> list[TaskRef | Reject]:
        """One ref per solved episode; failed ones and databases without rows are rejects already here."""
        answers: list[TaskRef | Reject] = []
        for key, row in self._rows.items():
            if isinstance(row, Reject):
                answers.append(row)
            elif not row["success"]:
                answers.append(Reject(where=key, reason="episode_failed", detail=str(row["id"])))
            elif self._empty[row["db"]]:
                answers.append(Reject(where=key, reason="empty_database", detail=row["db"]))
            else:
                answers.append(TaskRef(key=key, task_id=_task_id(row)))
        return answers

    def read(self, key: str) -> Trajectory | Reject:
        """The episode; turns whose query fails here are marked so that they do not become candidates."""
        row = self._rows[key]
        if isinstance(row, Reject):
            return row
        try:
            messages = parse_messages(row["messages"])
        except Malformed as fault:
            return fault.reject(key)
        failures, solved = self._replay(row, messages)
        if not solved:
            return Reject(where=key, reason="not_reproduced", detail=f"the last result is not the gold result here: {row['gold_sql']}")
        state = {"db": row["db"], "gold_sql": row["gold_sql"], "question": next((m.content for m in messages if m.role == "user"), "")}
        if messages[0].role == "system":
            state["system"] = messages[0].content
        return Trajectory(
            id=str(row["id"]),
            task_id=_task_id(row),
            domain=self._domain.name,
            messages=messages,
            tools=(EXECUTE_SQL,),
            state=state | ({"skip_turns": failures} if failures else {}),
            reward=1.0,
        )

    def _replay(self, row: dict[str, Any], messages: tuple[Message, ...]) -> tuple[dict[str, str], bool]:
        """({turn: reason} of the turns whose query fails here, whether the last query finds the gold rows)."""
        failures: dict[str, str] = {}
        with closing(Database(self._domain, row["db"], time_limit_s=self._domain.verifier_timeout_s / 2)) as database:
            last = None
            for turn, message in enumerate(message for message in messages if message.role == "assistant"):
                try:
                    for call in message.tool_calls:
                        last = None if call_fault(call) else database.run(call.arguments["query"])
                except QueryFailed:
                    last = None
                    failures[str(turn)] = "expert_query_failed"
            try:
                return failures, last is not None and not mismatch(database.run(row["gold_sql"]), last)
            except QueryFailed:
                return failures, False


def _task_id(row: dict[str, Any]) -> str:
    gold = " ".join(row["gold_sql"].rstrip("; ").lower().split())
    return f"{row['db']}:{hashlib.sha256(gold.encode()).hexdigest()[:12]}"


def _chat_rows(domain: DomainConfig) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    for where, line in jsonl_lines(domain):
        try:
            row = decode_object(line)
        except Malformed as fault:
            yield where, fault.reject(where)
            continue
        missing = [field for field in _FIELDS if field not in row]
        yield where, Reject(where=where, reason="missing_fields", detail=", ".join(missing)) if missing else row


def _upstream_rows(files: list[Path]) -> Iterator[tuple[str, dict[str, Any] | Reject]]:
    """InterCode's result files: {"<n>": {"task_id", "query", "turn_history": {actions, observations, rewards}, ...}}."""
    spider = files[0].with_name("ic_spider_dev.json")
    if not spider.exists():
        raise FileNotFoundError(f"{spider} does not exist: copy data/sql/spider/ic_spider_dev.json of the InterCode repository there")
    tasks = json.loads(spider.read_text(encoding="utf-8"))
    for file in files:
        for number, episode in json.loads(file.read_text(encoding="utf-8")).items():
            where = f"{file.name}:{number}"
            try:
                task, history = tasks[episode["task_id"]], episode["turn_history"]
                success = max(history["rewards"], default=0) == 1
                messages: list[dict[str, Any]] = [{"role": "user", "content": episode["query"]}]
                for turn, (action, seen) in enumerate(zip(history["actions"], history["observations"], strict=True)):
                    call = {"id": f"c{turn}", "function": {"name": "execute_sql", "arguments": {"query": action}}}
                    messages.append({"role": "assistant", "tool_calls": [call]})
                    messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": str(seen)[:MAX_OBSERVATION_CHARS]})
                identity = {"id": f"{file.stem}_{number}", "db": task["db"], "gold_sql": task["gold"], "success": success}
                yield where, identity | {"messages": messages}
            except (KeyError, IndexError, TypeError, ValueError) as error:
                yield where, Reject(where=where, reason="missing_fields", detail=repr(error))


def convert_dump(dump: Path, folder: Path) -> list[Path]:
    """Turn InterCode's MySQL dump of the Spider databases into one <database>.sqlite each; returns the files, sorted.

    Raises:
        ValueError: a statement that SQLite does not take; names the database and the statement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    connection, paths, statement, name = None, {}, "", ""
    for line in dump.read_text(encoding="utf-8").splitlines():
        statement += line + "\n"
        if not line.endswith(";"):
            statement = "" if line.startswith("--") else statement
            continue
        done, statement = statement.strip(), ""
        if done.startswith("USE "):
            if connection is not None:
                connection.commit()
                connection.close()
            name = done[4:].strip(" `;")
            paths[name] = folder / f"{name}.sqlite"
            paths[name].unlink(missing_ok=True)
            connection = sqlite3.connect(paths[name])
        elif connection is not None and done.startswith(("CREATE TABLE", "INSERT INTO")):
            try:
                connection.execute(_sqlite_statement(done))
            except sqlite3.Error as error:
                raise ValueError(f"{dump}, database {name}: {error} in {done[:200]}") from error
    if connection is not None:
        connection.commit()
        connection.close()
    return sorted(paths.values())


def _sqlite_statement(statement: str) -> str:
    """A CREATE TABLE or INSERT of mysqldump in SQLite's dialect."""
    if statement.startswith("INSERT"):
        escapes = {"n": "\n", "r": "\r", "t": "\t", "'": "''", "0": ""}
        return re.sub(r"\\(.)", lambda match: escapes.get(match[1], match[1]), statement, flags=re.S)
    lines = [line.strip().rstrip(",") for line in statement.splitlines()[1:-1]]
    lines = [re.sub(r"^UNIQUE KEY `[^`]*`", "UNIQUE", line) for line in lines if not line.startswith(("KEY ", "FULLTEXT KEY "))]
    noise = r"(?<=`)\(\d+\)| AUTO_INCREMENT| CHARACTER SET \w+| COLLATE \w+| unsigned| ON UPDATE CURRENT_TIMESTAMP| COMMENT '[^']*'"
    return statement.splitlines()[0] + ",\n".join(re.sub(noise, "", line) for line in lines) + ")"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m pivotrl.sources.intercode_sql DUMP.sql FOLDER")
    for written in convert_dump(Path(sys.argv[1]), Path(sys.argv[2])):
        print(written)
