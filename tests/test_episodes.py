"""Episodes side by side in a toy world, with a scripted client."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakes import completion, make_sampler, renderer  # noqa: E402

from pivotrl import episodes, preemption  # noqa: E402
from pivotrl.config import RolloutConfig  # noqa: E402
from pivotrl.rollout.client import SampleRequest  # noqa: E402
from pivotrl.types import Message  # noqa: E402


class Counter:
    """Wants to hear "up" `goal` times, then "done"; crashes where it is told to."""

    def __init__(self, name: str, goal: int, crash: str = ""):
        self.name, self.goal, self.crash, self.count = name, goal, crash, 0

    def _at(self, where: str) -> None:
        if self.crash == where:
            raise KeyError(f"the world fell over in {where}")

    def reset(self):
        self._at("reset")
        return (Message(role="user", content=f"{self.name}, goal {self.goal}"),)

    def step(self, action):
        self._at("step")
        self.count += action.content == "up"
        return (Message(role="user", content=f"count {self.count}"),), action.content == "done"

    def reward(self):
        self._at("reward")
        return float(self.count == self.goal)


def climb(request: SampleRequest) -> list:
    text = renderer().tokenizer.decode(request.prompt)
    return [completion("done" if f"count {text.partition('goal ')[2][0]}" in text else "up")]


def request(episode: episodes.Episode, prompt: tuple[int, ...]) -> SampleRequest:
    return SampleRequest(prompt=prompt, n=1, seed=len(episode.turns), max_tokens=20, routing_key=episode.task_id)


def begin(*worlds: Counter) -> list[episodes.Episode]:
    return [episodes.Episode(world.name, 0, world, ()) for world in worlds]


def play(folder: Path, *worlds: Counter, max_turns: int = 9, max_prompt_tokens: int = 1000, answer=climb):
    """Ended episodes by name, and the client."""
    sampler, client = make_sampler(folder, answer, RolloutConfig(max_prompt_tokens=max_prompt_tokens))
    return {e.task_id: e for e in episodes.run(sampler, begin(*worlds), request, max_turns=max_turns)}, client


def test_an_episode_ends_where_its_world_says_with_the_worlds_reward(tmp_path):
    ended, client = play(tmp_path, Counter("a", 1), Counter("b", 3), Counter("c", 0))
    assert {name: (e.end, e.reward, [turn.text for turn in e.turns]) for name, e in ended.items()} == {
        "a": ("done", 1.0, ["up", "done"]),
        "b": ("done", 1.0, ["up"] * 3 + ["done"]),
        "c": ("max_turns", 0.0, ["up"] * 9),
    }
    assert len(client.requests) == 2 + 4 + 9 and all(e.environment_s > 0 for e in ended.values())


def test_limits_end_an_episode_with_what_the_world_then_says(tmp_path):
    ended, client = play(tmp_path, Counter("a", 3), Counter("b", 8), max_turns=3)
    assert {name: (e.end, e.reward, len(e.turns)) for name, e in ended.items()} == {
        "a": ("max_turns", 1.0, 3),
        "b": ("max_turns", 0.0, 3),
    }
    ended, client = play(tmp_path, Counter("a", 2), max_prompt_tokens=60)
    (episode,) = ended.values()
    assert episode.end == "over_long" and 0 < len(episode.turns) < 3 and max(len(r.prompt) for r in client.requests) <= 60


def test_a_first_history_that_is_too_long_asks_nothing(tmp_path):
    ended, client = play(tmp_path, Counter("a" * 50, 0), Counter("b", 1), max_prompt_tokens=60)
    assert [(e.end, e.reward, e.turns) for e in ended.values()][0] == ("over_long", 1.0, [])
    assert {r.routing_key for r in client.requests} == {"b"}


def test_turns_tell_what_the_engine_was_given(tmp_path):
    """Prompts are kept as what is new in them: joined again, they are the requests' prompts, token for token."""
    ended, client = play(tmp_path, Counter("a", 4))
    (episode,) = ended.values()
    tokens: tuple[int, ...] = ()
    for turn, asked in zip(episode.turns, client.requests, strict=True):
        assert tokens[: turn.shared] + turn.prompt == asked.prompt and turn.shared == len(tokens), "a history only grows"
        tokens = asked.prompt + turn.completion.token_ids


def test_a_history_that_is_written_differently_branches_where_it_differs(tmp_path):
    """The policy's own blanks do not come back in its history, as the template writes it."""
    ended, client = play(tmp_path, Counter("a", 2), answer=lambda request: [completion("  up")], max_turns=2)
    (episode,) = ended.values()
    first, second = client.requests
    turn = episode.turns[1]
    assert turn.shared == len(first.prompt) and second.prompt == first.prompt + turn.prompt


@pytest.mark.parametrize(("where", "turns"), [("reset", 0), ("step", 1), ("reward", 3)])
def test_a_world_that_crashes_ends_its_own_episode_only(tmp_path, where, turns):
    ended, _ = play(tmp_path, Counter("bad", 2, crash=where), Counter("good", 2))
    assert (ended["bad"].end, len(ended["bad"].turns)) == ("error", turns)
    assert ended["bad"].error == f"KeyError: 'the world fell over in {where}'"
    assert (ended["good"].end, ended["good"].reward, ended["good"].error) == ("done", 1.0, "")


class ThreadedClient:
    """Answers on threads, as the real one does; the requests of "slow" wait for `others`."""

    def __init__(self):
        self.others, self.threads, self.futures = threading.Event(), ThreadPoolExecutor(4), []

    def wait_ready(self) -> None:
        pass

    def submit(self, request: SampleRequest):
        self.futures.append(self.threads.submit(self._answer, request))
        return self.futures[-1]

    def _answer(self, request: SampleRequest):
        if request.routing_key == "broken":
            raise RuntimeError("the server refused")
        if request.routing_key == "slow":
            assert self.others.wait(20), "the others wait for the slow one"
        return climb(request)


def test_nobody_waits_for_the_slowest(tmp_path):
    sampler, _ = make_sampler(tmp_path, climb)
    sampler.client = client = ThreadedClient()
    order = []
    for episode in episodes.run(sampler, begin(Counter("slow", 1), Counter("a", 4), Counter("b", 6)), request, max_turns=9):
        order.append(episode.task_id)
        if len(order) == 2:
            client.others.set()
    assert sorted(order[:2]) == ["a", "b"] and order[2] == "slow"


def test_a_request_that_fails_is_raised_and_nothing_is_left_in_flight(tmp_path):
    sampler, _ = make_sampler(tmp_path, climb)
    sampler.client = client = ThreadedClient()
    client.threads = ThreadPoolExecutor(1)
    worlds = begin(Counter("broken", 1), Counter("slow", 1), Counter("a", 1))
    with pytest.raises(RuntimeError, match="the server refused"):
        list(episodes.run(sampler, worlds, request, max_turns=9))
    client.others.set()
    assert client.futures[-1].cancelled() and all(future.done() or future.running() for future in client.futures)


def test_asked_to_leave_it_begins_and_ends_nothing_more(tmp_path, monkeypatch):
    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    sampler, client = make_sampler(tmp_path, lambda request: (len(client.requests) == 5 and received.append(15), climb(request))[1])
    ended = list(episodes.run(sampler, begin(Counter("a", 1), Counter("b", 1), Counter("c", 1)), request, max_turns=9))
    assert [episode.task_id for episode in ended] == [] and len(client.requests) == 5
