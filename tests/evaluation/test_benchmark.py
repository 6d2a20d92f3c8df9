"""Evaluation with a scripted policy: in a toy world, and as tau2's own expert in the real telecom world."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from fakes import candidate, completion, make_sampler, renderer  # noqa: E402

from pivotrl import preemption  # noqa: E402
from pivotrl.candidates import cut  # noqa: E402
from pivotrl.config import Config, DomainConfig, EvaluationConfig, RolloutConfig  # noqa: E402
from pivotrl.evaluation import benchmark, skills  # noqa: E402
from pivotrl.records import read_jsonl, write_jsonl  # noqa: E402
from pivotrl.types import Completion, Episode, Message, Trajectory  # noqa: E402


class Staircase:
    """Solved by saying "up" `state["height"]` times and then "done"; answers with where one stands."""

    def __init__(self, domain: DomainConfig, state: dict):
        self.height, self.stands = state["height"], 0

    def reset(self):
        return (Message(role="user", content=f"stairs: {self.height}"),)

    def step(self, action):
        if action.content == "done":
            return (), True
        self.stands += action.content == "up"
        return (Message(role="user", content=f"step {self.stands}"),), False

    def reward(self):
        return float(self.stands == self.height)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    monkeypatch.setattr(benchmark, "build_environment", Staircase)
    trajectories = [
        Trajectory(id=f"t{height}", task_id=f"t{height}", domain="toy", messages=(), state={"height": height}, split=split)
        for height, split in ((0, "heldout"), (2, "heldout"), (3, "train"), (5, "heldout"), (9, "heldout"))
    ]
    write_jsonl(tmp_path / "candidates" / "trajectories.jsonl", trajectories)
    heldout = [candidate(f"c{i}", history=f"question {i}") for i in range(3)] + [candidate("long", history="very " * 100)]
    write_jsonl(tmp_path / "candidates" / "heldout.jsonl", heldout)
    return Config(
        run_dir=str(tmp_path / "run"),
        candidates_path=str(tmp_path / "candidates"),
        domain=DomainConfig(name="toy", environment="toy"),
        rollout=RolloutConfig(max_prompt_tokens=150, max_new_tokens=20, temperature=0.7),
        evaluation=EvaluationConfig(max_turns=7, pivot_samples=2, skill_examples=3),
    )


def prompt_text(request) -> str:
    return renderer().tokenizer.decode(request.prompt)


def climber(request) -> list[Completion]:
    """Knows nothing but the prompt. Wrong at the stairs of 2: says "done" one step too early."""
    text = prompt_text(request)
    height = int(text.partition("stairs: ")[2].partition("<")[0])
    taken = text.count("\nstep ")
    return [completion("done" if taken == height - (height == 2) else "up")]


def make(config: Config, answer):
    return make_sampler(Path(config.candidates_path), answer, config.rollout)


def test_episodes_end_as_they_should(config):
    config.rollout.max_prompt_tokens = 220
    sampler, client = make(config, climber)
    trajectories = read_jsonl(Path(config.candidates_path) / "trajectories.jsonl", Trajectory)
    episodes = list(benchmark.run_episodes(config, sampler, trajectories))
    assert [(e.task_id, e.reward, e.turns, e.end) for e in episodes] == [
        ("t0", 1.0, 1, "done"),
        ("t2", 0.0, 2, "done"),
        ("t3", 1.0, 4, "done"),
        ("t5", 1.0, 6, "done"),
        ("t9", 0.0, 7, "max_turns"),
    ]
    assert episodes[2].actions == ("up", "up", "up", "done")
    assert len(client.requests) == sum(e.turns for e in episodes), "an ended episode asks for no more actions"


def test_a_history_that_outgrows_the_prompt_limit_ends_its_episode(config):
    (short, long) = (Trajectory(id=i, task_id=i, domain="toy", messages=(), state={"height": h}) for i, h in (("a", 1), ("b", 9)))
    config.rollout.max_prompt_tokens = 100
    sampler, client = make(config, climber)
    episodes = list(benchmark.run_episodes(config, sampler, [short, long]))
    assert [e.end for e in episodes] == ["done", "over_long"] and 0 < episodes[1].turns < 7
    assert max(len(request.prompt) for request in client.requests) <= 100


def test_an_action_that_was_cut_off_reaches_the_world_as_malformed(config, monkeypatch):
    seen = []
    monkeypatch.setattr(Staircase, "step", lambda self, action: seen.append(action) or ((), True))
    sampler, _ = make(config, lambda request: [completion("up", finish_reason="length")])
    list(benchmark.run_episodes(config, sampler, [Trajectory(id="a", task_id="a", domain="toy", messages=(), state={"height": 1})]))
    assert [action.malformed for action in seen] == [f"cut off after {len(completion('up', finish_reason='length').token_ids)} tokens"]


def test_requests_are_greedy_and_seeded_by_task_and_turn(config):
    sampler, client = make(config, climber)
    trajectories = read_jsonl(Path(config.candidates_path) / "trajectories.jsonl", Trajectory)[:3]
    list(benchmark.run_episodes(config, sampler, trajectories))
    requests = list(client.requests)
    assert {(r.n, r.temperature, r.top_p, r.max_tokens, r.stop_token_ids) for r in requests} == {(1, 0.0, 1.0, 20, renderer().stop_ids)}
    assert len({r.seed for r in requests}) == len(requests) and {r.routing_key for r in requests} == {"t0", "t2", "t3"}
    client.requests.clear()
    list(benchmark.run_episodes(config, sampler, trajectories[1:2]))
    assert {r.seed for r in client.requests} < {r.seed for r in requests}, "a task's seeds do not depend on the others"


def test_task_success_is_of_heldout_tasks_and_measured_once(config, tmp_path):
    sampler, client = make(config, climber)
    path = tmp_path / "run" / "evaluation" / "x" / "episodes.jsonl"
    expected = {"task_success": 0.5, "tasks": 4, "turns_mean": (1 + 2 + 6 + 7) / 4, "episode_ends": {"done": 3, "max_turns": 1}}
    config.rollout.max_prompt_tokens = 220
    assert benchmark.task_success(config, sampler, path) == expected
    assert [e.task_id for e in read_jsonl(path, Episode)] == ["t0", "t2", "t5", "t9"]
    client.requests.clear()
    assert benchmark.task_success(config, sampler, path) == expected and not client.requests
    config.evaluation.max_tasks = 1
    assert benchmark.task_success(config, sampler, path.with_name("other.jsonl"))["task_success"] == 1.0


def test_pivot_reward_counts_what_it_could_not_judge(config):
    answers = iter(("right", "right", "wrong", "crash", "right", "wrong"))
    sampler, client = make(config, lambda request: [completion(next(answers)) for _ in range(request.n)])
    got = benchmark.pivot_reward(config, sampler)
    assert got == {"pivot_reward": 3 / 5, "pivot_candidates": 3, "pivot_over_long": 1, "pivot_dropped_samples": 1}
    assert {r.temperature for r in client.requests} == {0.7}, "as the policy is trained, not greedy"
    config.evaluation.max_pivot_candidates = 1
    sampler, _ = make(config, lambda request: [completion("right")] * request.n)
    assert benchmark.pivot_reward(config, sampler)["pivot_candidates"] == 1


def skilled(config: Config, *, families) -> tuple:
    """A policy that answers the questions of some families; a prompt that is not just the question is none it knows."""
    known = {}
    for family in skills.FAMILIES:
        for e in skills.generate(family, config.evaluation.skill_examples, seed=config.seed, split="heldout"):
            question = tuple(renderer().prompt([Message(role="user", content=e.prompt)], ()))
            known[question] = e.answer if family in families else "no idea"
    return make(config, lambda request: [completion(known[request.prompt])])


@pytest.mark.parametrize(("families", "score"), [(tuple(skills.FAMILIES), 1.0), (("add", "sort"), 0.2), ((), 0.0)])
def test_skills_are_asked_without_their_answers(config, families, score):
    sampler, client = skilled(config, families=families)
    got = benchmark.out_of_domain(config, sampler)
    assert got["out_of_domain"] == pytest.approx(score)
    assert {family for family, value in got["skills"].items() if value == 1} == set(families)
    assert len(client.requests) == 3 * len(skills.FAMILIES) and {r.temperature for r in client.requests} == {0.0}


def test_evaluate_writes_one_result(config, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "out_of_domain", lambda config, sampler: {"out_of_domain": 0.25, "skills": {}})

    def answer(request):
        return climber(request) if "stairs" in prompt_text(request) else [completion("right")] * request.n

    sampler, _ = make(config, answer)
    result = benchmark.evaluate(config, sampler, tmp_path / "run" / "evaluation" / "before")
    assert (result["pivot_reward"], result["task_success"], result["out_of_domain"]) == (1.0, 0.5, 0.25)
    assert json.loads((tmp_path / "run" / "evaluation" / "before" / "result.json").read_text()) == result
    config.domain.environment = None
    assert "task_success" not in benchmark.evaluate(config, sampler, tmp_path / "run" / "evaluation" / "without_world")


def test_what_a_stopped_evaluation_has_measured_is_not_measured_again(config, tmp_path, monkeypatch):
    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    monkeypatch.setattr(benchmark, "out_of_domain", lambda config, sampler: {"out_of_domain": 0.25, "skills": {}})

    def answer(request):
        return climber(request) if "stairs" in prompt_text(request) else [completion("right")] * request.n

    sampler, client = make(config, lambda request: ("stairs" in prompt_text(request) and received.append(10), answer(request))[1])
    with pytest.raises(preemption.Preempted, match="0 of 4 episodes"):
        benchmark.evaluate(config, sampler, tmp_path / "run" / "evaluation" / "x")
    folder = tmp_path / "run" / "evaluation" / "x"
    assert not (folder / "result.json").exists()
    received.clear()
    sampler, client = make(config, answer)
    result = benchmark.evaluate(config, sampler, tmp_path / "run" / "evaluation" / "x")
    assert all("stairs" in prompt_text(request) for request in client.requests), "pivot rewards were kept"
    assert sorted(path.name for path in folder.iterdir()) == ["episodes.jsonl", "result.json"]
    client.requests.clear()
    assert benchmark.evaluate(config, sampler, tmp_path / "run" / "evaluation" / "x") == result and not client.requests
    assert result == benchmark.evaluate(config, sampler, tmp_path / "run" / "evaluation" / "whole")


def test_a_world_that_crashes_is_no_failure_of_the_policy(config, tmp_path, monkeypatch):
    def step(self, action):
        if self.height == 5:
            raise KeyError("the world fell over")
        return Staircase.step(self, action)

    monkeypatch.setattr(benchmark, "build_environment", type("Crashing", (Staircase,), {"step": step}))
    sampler, _ = make(config, climber)
    result = benchmark.task_success(config, sampler, tmp_path / "episodes.jsonl")
    assert (result["tasks"], result["task_success"]) == (3, 1 / 3)
    assert result["episode_ends"] == {"done": 2, "error": 1, "over_long": 1}


def test_the_expert_solves_the_real_telecom_tasks(tmp_path):
    """A policy that makes the expert's turns, and knows each only by the tokens of its history, succeeds in tau2."""
    from pivotrl.sources.tau2_telecom import TelecomExpertSource

    domain = DomainConfig(name="tau2_telecom", source="tau2_telecom", environment="tau2_telecom", system_prompt=False)
    source = TelecomExpertSource(domain)
    wanted = ("[service_issue]airplane_mode_on", "[mobile_data_issue]data_mode_off", "[mms_issue]bad_wifi_calling")
    keys = [next(ref.key for ref in source.refs() if ref.key.startswith(prefix)) for prefix in wanted]
    trajectories = [source.read(key) for key in keys]
    turns = [c for trajectory in trajectories for c in cut(trajectory)[0]]
    script = {tuple(renderer().prompt(c.history, ())): tuple(renderer().action_ids(c.expert, c.history, ())) for c in turns}

    def answer(request):
        tokens = script[request.prompt]
        return [Completion(token_ids=tokens, logprobs=(0.0,) * len(tokens), finish_reason="stop", policy_version=0)]

    config = Config(domain=domain, rollout=RolloutConfig(max_prompt_tokens=100_000), evaluation=EvaluationConfig(max_turns=30))
    sampler, _ = make_sampler(tmp_path, answer, config.rollout)
    episodes = list(benchmark.run_episodes(config, sampler, trajectories))
    assert [(e.reward, e.end) for e in episodes] == [(1.0, "done")] * 3
    assert [e.turns for e in episodes] == [sum(c.trajectory_id == key for c in turns) for key in keys]
    config.evaluation.max_turns = 3
    assert [(e.reward, e.end) for e in benchmark.run_episodes(config, sampler, trajectories)][1:] == [(0.0, "max_turns")] * 2


def test_asked_to_leave_the_episodes_that_are_over_are_not_run_again(config, tmp_path, monkeypatch):
    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    config.rollout.max_prompt_tokens = 220
    path = tmp_path / "run" / "evaluation" / "x" / "episodes.jsonl"
    sampler, client = make(config, lambda request: (len(client.requests) == 8 and received.append(15), climber(request))[1])
    with pytest.raises(preemption.Preempted, match="2 of 4 episodes are over"):
        benchmark.task_success(config, sampler, path)
    assert not path.exists()
    received.clear()
    sampler, again = make(config, climber)
    result = benchmark.task_success(config, sampler, path)
    whole = benchmark.task_success(config, sampler, tmp_path / "whole.jsonl")
    assert result == whole and path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(list(path.parent.iterdir())) == 1 and result["tasks"] == 4
