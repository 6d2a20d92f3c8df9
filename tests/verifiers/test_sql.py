import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

from pivotrl.candidates import cut
from pivotrl.config import DomainConfig
from pivotrl.sources.intercode_sql import InterCodeSqlSource
from pivotrl.types import Action, Candidate, Message, TaskRef, ToolCall, Trajectory
from pivotrl.verifiers import build_verifier


@pytest.fixture
def domain(tmp_path: Path) -> DomainConfig:
    (tmp_path / "sqlite").mkdir()
    with sqlite3.connect(tmp_path / "sqlite" / "music.sqlite") as connection:
        connection.executescript(
            "CREATE TABLE singer (id INT, name TEXT, age INT); CREATE TABLE band (id INT, name TEXT, age INT); CREATE TABLE fan (x INT);"
            "INSERT INTO singer VALUES (1, 'Ann', 30), (2, 'Bob', 20), (3, 'Cy', 20);"
        )
    return DomainConfig(
        name="sql", source="intercode_sql", verifier="sql", data_path=str(tmp_path), verifier_timeout_s=2.0, max_result_rows=20
    )


def action(*queries) -> Action:
    return Action(tool_calls=tuple(ToolCall(name="execute_sql", arguments={"query": query}) for query in queries))


def candidate(expert: Action) -> Candidate:
    history = (Message(role="user", content="q"),)
    return Candidate(id="e:0", trajectory_id="e", task_id="t", domain="sql", turn=0, history=history, expert=expert, state={"db": "music"})


def score(domain: DomainConfig, expert: Action, *actions: Action):
    return build_verifier("sql", domain).verify(candidate(expert), actions)


def test_the_same_rows_by_another_query(domain: DomainConfig):
    verdicts = score(
        domain,
        action("SELECT name FROM singer WHERE age = 20"),
        action("SELECT name FROM singer WHERE age < 30 ORDER BY name DESC"),
        action("SELECT s.name FROM singer AS s WHERE s.age IN (20);"),
        action("SELECT name FROM singer"),
        action("SELECT id FROM singer WHERE age = 20"),
        action("SELECT 'Bob' UNION SELECT 'Cy'"),
    )
    assert [v.reward for v in verdicts] == [1, 1, 0, 0, 0]
    assert [v.status for v in verdicts] == ["ok"] * 5
    assert verdicts[0].reason == "same result" and "3 instead of 2" in verdicts[2].reason


def test_order_counts_only_if_the_expert_ordered(domain: DomainConfig):
    up, down = action("SELECT id FROM singer ORDER BY id"), action("SELECT id FROM singer ORDER BY id DESC")
    assert [v.reward for v in score(domain, up, up, down)] == [1, 0]
    assert [v.reward for v in score(domain, action("SELECT id FROM singer"), up, down)] == [1, 1]


def test_empty_results_need_the_same_tables(domain: DomainConfig):
    expert = action("SELECT name FROM singer WHERE age = 99")
    same, other = action("SELECT name FROM singer WHERE id = 77"), action("SELECT x FROM fan")
    verdicts = score(domain, expert, same, other, action("SELECT 1 WHERE 0"))
    assert [v.reward for v in verdicts] == [1, 0, 0]


def test_look_ups_are_compared_by_what_they_reveal(domain: DomainConfig):
    verdicts = score(domain, action("DESCRIBE singer"), action("SHOW COLUMNS FROM `singer`;"), action("DESC fan"), action("SHOW TABLES"))
    assert [v.reward for v in verdicts] == [1, 0, 0]
    verdicts = score(domain, action("SHOW TABLES"), action("show tables;"), action("SELECT name FROM singer"))
    assert [v.reward for v in verdicts] == [1, 0]


def test_twin_tables_are_not_the_same_look_up(domain: DomainConfig):
    assert [v.reward for v in score(domain, action("DESCRIBE singer"), action("DESCRIBE band"))] == [0]


@pytest.mark.parametrize(
    ("sampled", "reason"),
    [
        (action("SELECT nme FROM singer"), "error: Unknown column"),
        (action("SELECT id FROM singer; SELECT id FROM singer"), "error: You can only execute one statement"),
        (action("DROP TABLE singer"), "forbidden"),
        (action("SELECT 1 FROM singer a, singer b, singer c"), "row_limit"),
        (action("SELECT count(*) FROM " + ", ".join(f"singer s{i}" for i in range(30))), "time_limit"),
        (action(), "0 tool calls, the expert made 1"),
        (action("SELECT id FROM singer", "SELECT id FROM singer"), "2 tool calls"),
        (Action(malformed="no JSON"), "malformed: no JSON"),
        (action(7), "exactly one argument"),
        (Action(tool_calls=(ToolCall(name="bash", arguments={"query": "SELECT id FROM singer"}),)), "unknown tool 'bash'"),
        (Action(tool_calls=(ToolCall(name="execute_sql", arguments={"query": "SELECT id FROM singer", "x": 1}),)), "exactly one argument"),
    ],
)
def test_the_policys_faults_score_zero(domain: DomainConfig, sampled: Action, reason: str):
    start = time.monotonic()
    good = action("SELECT id FROM singer")
    bad, still_good = score(domain, good, sampled, good)
    assert (bad.reward, bad.status) == (0.0, "ok") and reason in bad.reason
    assert still_good.reward == 1.0
    assert time.monotonic() - start < domain.verifier_timeout_s


def test_an_expert_that_fails_here_is_an_error_not_a_zero(domain: DomainConfig):
    with pytest.raises(ValueError, match="e:0: the expert's own query does not run here: error: no such function: STR_TO_DATE"):
        score(domain, action("SELECT STR_TO_DATE('x')"), action("SELECT 1"))


def test_a_wrong_path_fails_at_once(domain: DomainConfig, tmp_path: Path):
    domain.data_path = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere/sqlite does not exist"):
        build_verifier("sql", domain)


def test_messages_and_submissions(domain: DomainConfig):
    talk = Action(content="There are 3 singers.")
    verdicts = score(domain, talk, Action(content=" there are 3 singers"), Action(content="4"), action("SELECT 1"))
    assert [v.reward for v in verdicts] == [1, 0, 0]
    submit = Action(tool_calls=(ToolCall(name="submit"),))
    assert [v.reward for v in score(domain, submit, submit, action("SELECT 1"), Action(content="done"))] == [1, 0, 0]


def test_every_expert_query_of_the_real_data_scores_one_against_itself(shared_data: Path):
    domain = DomainConfig(name="sql", source="intercode_sql", verifier="sql", data_path=str(shared_data / "intercode_sql"))
    source, verifier, counts = InterCodeSqlSource(domain), build_verifier("sql", domain), Counter()
    for ref in source.refs()[::4]:
        trajectory = source.read(ref.key) if isinstance(ref, TaskRef) else None
        for found in cut(trajectory)[0] if isinstance(trajectory, Trajectory) else ():
            own, silent = verifier.verify(found, [found.expert, action("SELECT 1 WHERE 0")])
            counts[own.reward, silent.reward] += 1
    assert set(counts) == {(1.0, 0.0)} and counts[1.0, 0.0] > 300
