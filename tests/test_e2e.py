"""Groups of whole episodes in a toy world, with a scripted client, and one real telecom task with a scripted expert."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakes import completion, make_sampler, renderer  # noqa: E402

from pivotrl import e2e, preemption  # noqa: E402
from pivotrl.batching import pack  # noqa: E402
from pivotrl.config import AlgorithmConfig, Config, DomainConfig, E2eConfig, LossLevel, RolloutConfig  # noqa: E402
from pivotrl.groups import step_pivots  # noqa: E402
from pivotrl.records import read_jsonl, write_jsonl  # noqa: E402
from pivotrl.types import Completion, EpisodeRollout, Message, Trajectory, Turn  # noqa: E402

GOALS = {"a": 1, "b": 2, "c": 3, "d": 1, "e": 2}


class Steps:
    """Solved by `goal` times "up" and then "done"; the goal 13 brings it down."""

    def __init__(self, domain: DomainConfig, state: dict):
        self.goal, self.count = state["goal"], 0

    def reset(self):
        return (Message(role="user", content=f"goal {self.goal} "),)

    def step(self, action):
        if self.goal == 13:
            raise KeyError("no such step")
        self.count += action.content == "up"
        return (Message(role="user", content=f"count {self.count}"),), action.content == "done"

    def reward(self):
        return float(self.count == self.goal)


def task(name: str, goal: int, split: str = "train", **values) -> Trajectory:
    return Trajectory(id=f"t{name}", task_id=name, domain="toy", messages=(), state={"goal": goal}, split=split, **values)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.setattr(e2e, "build_environment", Steps)
    return Config(
        run_dir=str(tmp_path / "run"),
        candidates_path=str(tmp_path / "candidates"),
        domain=DomainConfig(name="toy", environment="sql"),
        rollout=RolloutConfig(max_prompt_tokens=400, max_new_tokens=20, temperature=0.7),
        algorithm=AlgorithmConfig(group_size=3),
        e2e=E2eConfig(tasks_per_step=2, max_turns=6),
    )


def climb(request) -> list[Completion]:
    """Goes up to the goal; samples of odd index stop one step too early."""
    text = renderer().tokenizer.decode(request.prompt)
    wanted = int(text.partition("goal ")[2].partition(" ")[0])
    index = int(request.routing_key.rpartition(":")[2])
    return [completion("done" if text.count("\ncount") >= wanted - index % 2 else "up", version=7)]


def make(config: Config, answer=climb, tasks=None):
    sampler, client = make_sampler(Path(config.run_dir).parent, answer, config.rollout)
    tasks = [task(name, goal) for name, goal in GOALS.items()] if tasks is None else tasks
    return e2e.EpisodeGroups(config, sampler, tasks), client


def rollout(name: str, index: int, reward: float, *lengths: int, end: str = "done") -> EpisodeRollout:
    """An episode whose turns have so many action tokens, each behind a prompt that has grown by four tokens."""
    turns, shared = [], 0
    for number, length in enumerate(lengths):
        new = tuple(range(100 * index + 10 * number, 100 * index + 10 * number + 4))
        logprobs = tuple(-0.1 * (t + 1) for t in range(length))
        action = Completion(token_ids=tuple(range(length)), logprobs=logprobs, finish_reason="stop", policy_version=number)
        turns.append(Turn(prompt=new, shared=shared, completion=action, text="", num_calls=number % 2))
        shared += 4 + length
    return EpisodeRollout(task_id=name, index=index, reward=reward, end=end, turns=tuple(turns), environment_s=0.5)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Config(domain=DomainConfig(name="terminal")), "domain 'terminal': environment None cannot be acted in.*sql, tau2_telecom"),
        (Config(domain=DomainConfig(name="x", environment="sql"), e2e=E2eConfig(tasks_per_step=0)), "e2e.tasks_per_step=0: at least 1"),
        (Config(domain=DomainConfig(name="x", environment="sql"), e2e=E2eConfig(max_turns=0)), "e2e.max_turns=0: at least 1"),
    ],
)
def test_settings_without_episodes_are_refused(config, text):
    with pytest.raises(ValueError, match=text):
        e2e.check(config)
    e2e.check(Config(domain=DomainConfig(name="x", environment="tau2_telecom")))


def test_tasks_are_those_of_the_split_each_once(config):
    path = Path(config.candidates_path) / "trajectories.jsonl"
    again = task("a", 9)
    write_jsonl(path, [task("a", 1), task("b", 2), again, task("w", 1, "warmup"), task("h", 1, "heldout")])
    assert [(t.task_id, t.state["goal"]) for t in e2e.load_tasks(config)] == [("a", 1), ("b", 2)]
    config.e2e.split = "expert"
    with pytest.raises(ValueError, match=r"trajectories.jsonl holds no 'expert' tasks; set e2e.split"):
        e2e.load_tasks(config)


def test_a_step_plays_a_group_of_episodes_for_each_task(config):
    source, client = make(config)
    groups = source.sample(0)
    chosen = step_pivots(source.tasks, 2, step=0, seed=0)
    assert [[(r.task_id, r.index) for r in group] for group in groups] == [[(t.task_id, i) for i in range(3)] for t in chosen]
    assert [[r.reward for r in group] for group in groups] == [[1.0, 0.0, 1.0]] * 2
    assert len(client.requests) == sum(len(r.turns) for group in groups for r in group)
    assert {(r.n, r.temperature, r.top_p, r.max_tokens, r.stop_token_ids) for r in client.requests} == {
        (1, 0.7, 1.0, 20, renderer().stop_ids)
    }
    assert {r.routing_key for r in client.requests} == {f"{t.task_id}:{i}" for t in chosen for i in range(3)}
    assert source.versions(groups) == [7] * len(client.requests)


def test_a_request_depends_on_seed_step_task_sample_and_turn_only(config):
    def asked(step: int, tasks, seed: int = 0, name: str = "x") -> dict:
        config.run_dir, config.seed, config.e2e.tasks_per_step = str(Path(config.run_dir).parent / name), seed, len(tasks)
        source, client = make(config, tasks=tasks)
        source.sample(step)
        return {(r.routing_key, len(r.prompt)): r.seed for r in client.requests}

    tasks = [task(name, goal) for name, goal in GOALS.items()]
    whole = asked(3, tasks)
    assert len(set(whole.values())) == len(whole), "no two requests share a seed"
    alone = asked(3, tasks[1:2], name="alone")
    assert alone.items() <= whole.items() and len(alone) < len(whole)
    assert not set(asked(4, tasks, name="later").values()) & set(whole.values())
    assert not set(asked(3, tasks, seed=1, name="seed").values()) & set(whole.values())


def test_every_action_token_of_every_turn_has_the_episodes_advantage(config):
    config.algorithm.group_size = 2
    source, _ = make(config)
    items = source.items([[rollout("p", 0, 1, 2, 3), rollout("p", 1, 0, 5, 1, 4)]])
    assert [item.unit for item in items] == ["p:0"] * 2 + ["p:1"] * 3
    assert [len(item.scored) for item in items] == [2, 3, 5, 1, 4]
    expected = [[1.0] * 2, [1.0] * 3, [-1.0] * 5, [-1.0], [-1.0] * 4]
    assert [item.fields["advantages"] for item in items] == [pytest.approx(values, abs=1e-5) for values in expected]
    assert {weight for item in items for weight in item.fields["weights"]} == {1 / 15}
    second = items[1]
    assert second.token_ids == [0, 1, 2, 3, 0, 1, 10, 11, 12, 13, 0, 1, 2] and list(second.scored) == [10, 11, 12]
    assert second.fields["rollout_logprobs"] == [-0.1, -0.2, pytest.approx(-0.3)]


def test_at_the_sequence_level_an_episode_is_one_sequence(config):
    config.algorithm.loss_level = LossLevel.sequence
    items = make(config)[0].items([[rollout("p", 0, 1, 2, 3), rollout("p", 1, 0, 1, 1, 4)]])
    sums = {unit: sum(sum(item.fields["weights"]) for item in items if item.unit == unit) for unit in ("p:0", "p:1")}
    assert sums == {"p:0": pytest.approx(0.5), "p:1": pytest.approx(0.5)}
    assert len({weight for item in items[2:] for weight in item.fields["weights"]}) == 1


def test_groups_without_signal_cost_nothing_but_count(config):
    source, _ = make(config)
    live = [rollout("p", 0, 1, 2), rollout("p", 1, 0, 3)]
    dead = [rollout("q", 0, 0, 6, 6), rollout("q", 1, 0, 3)]
    items = source.items([dead, live])
    assert {item.unit for item in items} == {"p:0", "p:1"} and {w for item in items for w in item.fields["weights"]} == {1 / 20}
    assert source.items([dead]) == source.items([]) == []


def test_an_episode_whose_world_crashed_is_dropped_not_scored(config):
    source, _ = make(config)
    crashed = rollout("p", 2, 0, 9, 9, end="error")
    items = source.items([[rollout("p", 0, 1, 2), rollout("p", 1, 0, 2), crashed]])
    assert {item.unit for item in items} == {"p:0", "p:1"} and items[0].fields["advantages"][0] == pytest.approx(1, abs=1e-5)
    assert items[0].fields["weights"] == [1 / 4] * 2
    assert source.items([[rollout("p", 0, 1, 2), crashed]]) == [], "one episode is no group"


def test_a_task_whose_world_crashes_does_not_stop_the_step(config):
    config.e2e.tasks_per_step = 2
    source, client = make(config, tasks=[task("bad", 13), task("a", 2)])
    groups = {group[0].task_id: group for group in source.sample(0)}
    assert [(r.end, r.error, len(r.turns)) for r in groups["bad"]] == [("error", "KeyError: 'no such step'", 1)] * 3
    assert [r.reward for r in groups["a"]] == [1.0, 0.0, 1.0]
    stats = source.statistics(list(groups.values()))
    assert (stats["dropped_samples"], stats["episodes_error"], stats["reward_mean"]) == (3, 3, pytest.approx(2 / 3))
    assert stats["rollout_turns"] == len(client.requests), "dropped, but paid for"


def test_statistics(config):
    groups = [
        [rollout("p", 0, 1, 2, 3), rollout("p", 1, 0, 5, 1, 4)],
        [rollout("q", 0, 1, 1, end="over_long"), rollout("q", 1, 1, 1, end="max_turns")],
    ]
    assert make(config)[0].statistics(groups) == {
        "reward_mean": 0.75,
        "reward_std": 0.25,
        "dead_group_share": 0.5,
        "dropped_samples": 0,
        "truncation_rate": 0.0,
        "calls_per_reply": pytest.approx(2 / 7),
        "message_turn_share": pytest.approx(5 / 7),
        "completion_tokens_mean": pytest.approx(17 / 7),
        "rollout_turns": 7,
        "rollout_tokens": 17,
        "prompt_tokens_mean": pytest.approx((4 + 10 + 4 + 13 + 18 + 4 + 4) / 7),
        "episodes": 4,
        "turns_per_episode": 7 / 4,
        "episodes_done": 2,
        "episodes_max_turns": 1,
        "episodes_over_long": 1,
        "episodes_error": 0,
        "environment_s": 2.0,
    }


def test_the_turns_of_an_episode_share_their_history_in_a_row(config):
    """A row holds an episode once, not once for every turn."""
    source, _ = make(config)
    groups = source.sample(0)
    items = source.items(groups)
    longest = {item.unit: len(item.token_ids) for item in items}  # the last turn's
    for unit in longest:
        (row,) = pack([item for item in items if item.unit == unit], max_row_tokens=1000, shared_prefix=True)
        assert len(row.token_ids_T) == longest[unit]
        assert len(row.positions_S) == sum(len(item.scored) for item in items if item.unit == unit)
    rows = pack(items, max_row_tokens=1000, shared_prefix=True)
    assert sum(len(row.token_ids_T) for row in rows) < sum(longest.values()), "episodes of one task share their beginning too"


def test_a_finished_step_is_read_not_played_again(config):
    source, client = make(config)
    groups = source.sample(1)
    folder = Path(config.run_dir) / "rollouts"
    assert [path.name for path in folder.iterdir()] == ["step_000001.jsonl"]
    client.requests.clear()
    assert source.sample(1) == groups and not client.requests
    assert [r for group in groups for r in group] == read_jsonl(folder / "step_000001.jsonl", EpisodeRollout)


def test_asked_to_leave_it_keeps_the_episodes_that_are_over(config, monkeypatch):
    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    config.e2e.tasks_per_step = 4
    source, client = make(config)
    whole = source.sample(2)
    config.run_dir = str(Path(config.run_dir).parent / "left")
    source, client = make(config, lambda request: (len(client.requests) == 20 and received.append(15), climb(request))[1])
    assert source.sample(2) is None
    journal = Path(config.run_dir) / "rollouts" / "step_000002.journal.jsonl"
    done = {(r.task_id, r.index) for r in read_jsonl(journal, EpisodeRollout)}
    assert 0 < len(done) < 12
    received.clear()
    with open(journal, "ab") as file:
        file.write(b'{"task_id": "torn')  # as kill -9 may leave it
    source, again = make(config)
    resumed = source.sample(2)
    played = {tuple(r.routing_key.split(":")) for r in again.requests}
    assert played == {(r.task_id, str(r.index)) for group in whole for r in group if (r.task_id, r.index) not in done}
    assert [[(r.task_id, r.reward, r.turns) for r in g] for g in resumed] == [[(r.task_id, r.reward, r.turns) for r in g] for g in whole]
    assert not journal.exists()


def test_probes_are_experts_histories_that_fit(config):
    says = tuple(Message(role=role, content=text) for role, text in (("user", "goal 1"), ("assistant", "up"), ("user", "count 1"))) * 9
    expert = Trajectory(id="t", task_id="t", domain="toy", messages=(*says, Message(role="assistant", content="done")), split="train")
    (probe,) = make(config, tasks=[expert])[0].probes(4)
    assert probe == renderer().prompt(says, ())
    config.rollout.max_prompt_tokens = 100
    (short,) = make(config, tasks=[expert])[0].probes(4)
    assert 50 < len(short) <= 100 and short == probe[: len(short)]


def test_an_expert_is_rewarded_by_the_real_world(tmp_path):
    """The telecom expert's turns, found by the tokens of their history alone, earn 1; talk earns 0."""
    from pivotrl.candidates import cut
    from pivotrl.sources.tau2_telecom import TelecomExpertSource

    domain = DomainConfig(name="tau2_telecom", source="tau2_telecom", environment="tau2_telecom", system_prompt=False)
    source = TelecomExpertSource(domain)
    trajectory = source.read(next(ref.key for ref in source.refs() if ref.key.startswith("[mobile_data_issue]data_mode_off")))
    turns = cut(trajectory)[0]
    script = {tuple(renderer().prompt(c.history, ())): tuple(renderer().action_ids(c.expert, c.history, ())) for c in turns}

    def answer(request):
        tokens = script[request.prompt] if request.routing_key.endswith(":0") else completion("hello").token_ids
        return [Completion(token_ids=tokens, logprobs=(0.0,) * len(tokens), finish_reason="stop", policy_version=0)]

    config = Config(
        run_dir=str(tmp_path / "run"),
        domain=domain,
        rollout=RolloutConfig(max_prompt_tokens=100_000),
        algorithm=AlgorithmConfig(group_size=2),
        e2e=E2eConfig(tasks_per_step=1, max_turns=30),
    )
    sampler, _ = make_sampler(tmp_path, answer, config.rollout)
    groups = e2e.EpisodeGroups(config, sampler, [trajectory])
    ((expert, talker),) = played = groups.sample(0)
    assert (expert.reward, expert.end, len(expert.turns)) == (1.0, "done", len(turns))
    assert (talker.reward, talker.end, len(talker.turns)) == (0.0, "max_turns", 30)
    rows = pack([item for item in groups.items(played) if item.unit.endswith(":0")], max_row_tokens=10**6, shared_prefix=True)
    assert len(rows) == 1 and len(rows[0].token_ids_T) == len(groups.items(played)[len(turns) - 1].token_ids)
