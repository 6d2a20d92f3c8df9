"""Whole episodes: a policy acts in many environments side by side, for evaluation and for end-to-end RL.

They do not march in step: an episode asks for its next turn as soon as its world has answered, so the engine's batch stays full.
Worlds are stepped on the calling thread, between the answers of the engine.
"""

import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pivotrl import preemption
from pivotrl.environments import Environment
from pivotrl.local_rollouts import Sampler
from pivotrl.rollout.client import SampleRequest
from pivotrl.types import Action, Completion, Message, Trajectory, Turn

POLL_S = 0.2


@dataclass
class Episode:
    """An episode in progress; `run` fills in everything behind `tools`.

    `end` is "" while it goes on, then "done", "max_turns", "over_long" or "error" (the environment crashed: `error` says how, and there
    is no reward). `environment_s` are seconds in the environment.
    """

    task_id: str
    index: int
    environment: Environment
    tools: Sequence[dict[str, Any]]
    history: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    end: str = ""
    error: str = ""
    reward: float = 0.0
    environment_s: float = 0.0
    tokens: tuple[int, ...] = ()  # of the last turn: prompt and completion

    def in_world[T](self, call: Callable[[], T]) -> T | None:
        """What the environment returns; None where it crashes, which ends the episode."""
        started = time.perf_counter()
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - a benchmark's world may fail in any way, and one episode may not end all others
            self.end, self.error = "error", f"{type(error).__name__}: {error}"
            return None
        finally:
            self.environment_s += time.perf_counter() - started

    def act(self, prompt: tuple[int, ...], completion: Completion, text: str, action: Action) -> None:
        """Carry out an action; it and its answer become history."""
        shared = _common_length(self.tokens, prompt)
        self.turns.append(Turn(prompt=prompt[shared:], completion=completion, text=text, shared=shared, num_calls=len(action.tool_calls)))
        self.tokens = prompt + completion.token_ids
        answered = self.in_world(lambda: self.environment.step(action))
        if answered is not None:
            answers, done = answered
            self.history += [action.to_message(), *answers]
            self.end = "done" if done else ""


def run(
    sampler: Sampler,
    episodes: Iterable[Episode],
    request: Callable[[Episode, tuple[int, ...]], SampleRequest],
    *,
    max_turns: int,
) -> Iterator[Episode]:
    """Act in all episodes and yield each when it has ended, with its reward. `request` asks for an episode's next turn behind a prompt.

    An episode ends where its world says so, after `max_turns` actions, or where its history exceeds rollout.max_prompt_tokens.
    Asked to leave, it yields no more; the episodes that are not over are left where they are.
    """
    sampler.client.wait_ready()
    answered: queue.SimpleQueue[Future[list[Completion]]] = queue.SimpleQueue()
    waiting: dict[Future[list[Completion]], tuple[Episode, tuple[int, ...]]] = {}

    def ask(episode: Episode) -> bool:
        """Request the next turn; False when the episode is over instead."""
        prompt = _next_prompt(sampler, episode, max_turns)
        if prompt is None:
            return False
        future = sampler.client.submit(request(episode, prompt))
        waiting[future] = episode, prompt
        future.add_done_callback(answered.put)
        return True

    try:
        for episode in episodes:
            if preemption.requested():
                return
            episode.history += episode.in_world(episode.environment.reset) or ()
            if not ask(episode):
                yield episode
        while waiting and not preemption.requested():
            try:
                future = answered.get(timeout=POLL_S)
            except queue.Empty:
                continue
            episode, prompt = waiting.pop(future)
            (completion,) = future.result()
            text = sampler.renderer.decode(completion.token_ids)
            episode.act(prompt, completion, text, sampler.parse(completion, text))
            if not ask(episode):
                yield episode
    finally:
        for future in waiting:
            future.cancel()


def with_shared_tools(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """The same trajectories, equal tools being one object, so that the renderer knows them again."""
    known: list[tuple[dict[str, Any], ...]] = []
    found = []
    for trajectory in trajectories:
        tools = next((tools for tools in known if tools == trajectory.tools), None)
        if tools is None:
            known.append(tools := trajectory.tools)
        found.append(msgspec.structs.replace(trajectory, tools=tools))
    return found


def _next_prompt(sampler: Sampler, episode: Episode, max_turns: int) -> tuple[int, ...] | None:
    """The tokens that the next action continues; None where there is none, with the episode's end and reward filled in."""
    prompt = None
    if not episode.end and len(episode.turns) >= max_turns:
        episode.end = "max_turns"
    if not episode.end:
        prompt = tuple(sampler.renderer.prompt(episode.history, episode.tools))
        if len(prompt) <= sampler.rollout.max_prompt_tokens:
            return prompt
        episode.end = "over_long"
    if episode.end != "error":
        episode.reward = episode.in_world(episode.environment.reward) or 0.0
    return None


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
