"""End-to-end RL: groups of whole episodes, rewarded by the environment's own judgement of where they end.

The trainer, the loss and the rows are those of PivotRL; only the groups differ. docs/e2e.md says what it costs.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pivotrl import episodes, preemption, watchdog
from pivotrl.advantage import has_signal, moments
from pivotrl.batching import Item
from pivotrl.config import Config
from pivotrl.diagnostics import mean
from pivotrl.environments import ENVIRONMENTS, build_environment
from pivotrl.groups import action_item, scored_items, step_pivots
from pivotrl.local_rollouts import Sampler, seed_of
from pivotrl.records import completed, read_jsonl
from pivotrl.rollout.client import SampleRequest
from pivotrl.types import Completion, EpisodeRollout, Trajectory


def check(config: Config) -> None:
    """Raises ValueError for settings under which no episode could be played."""
    if config.domain.environment not in ENVIRONMENTS:
        raise ValueError(
            f"domain {config.domain.name!r}: environment {config.domain.environment!r} cannot be acted in; end-to-end RL needs one of "
            f"{', '.join(sorted(ENVIRONMENTS))}: take another domain, or train over pivots with recipes/train_grpo.py"
        )
    for name in ("tasks_per_step", "max_turns"):
        if getattr(config.e2e, name) < 1:
            raise ValueError(f"e2e.{name}={getattr(config.e2e, name)}: at least 1")


def load_tasks(config: Config) -> list[Trajectory]:
    """The first trajectory of each task of the split that config.e2e names.

    Raises:
        ValueError: there are none.
    """
    path = Path(config.candidates_path) / "trajectories.jsonl"
    tasks: dict[str, Trajectory] = {}
    for trajectory in read_jsonl(path, Trajectory):
        if trajectory.split == config.e2e.split:
            tasks.setdefault(trajectory.task_id, trajectory)
    if not tasks:
        raise ValueError(f"{path} holds no {config.e2e.split!r} tasks; set e2e.split to warmup, train or heldout")
    return episodes.with_shared_tools(tasks.values())


class EpisodeGroups:
    """The `GroupSource` of end-to-end RL: algorithm.group_size episodes of each of the step's tasks."""

    def __init__(self, config: Config, sampler: Sampler, tasks: Sequence[Trajectory]):
        self.config, self.sampler, self.tasks = config, sampler, tasks

    def sample(self, step: int) -> list[list[EpisodeRollout]] | None:
        path = Path(self.config.run_dir) / "rollouts" / f"step_{step:06d}.jsonl"
        size = self.config.algorithm.group_size
        chosen = step_pivots(self.tasks, self.config.e2e.tasks_per_step, step=step, seed=self.config.seed)
        wanted = {(task.task_id, index): task for task in chosen for index in range(size)}

        def play(done: set[tuple[str, int]]) -> Iterator[EpisodeRollout]:
            for rollout in self._play(step, [(task, index) for (name, index), task in wanted.items() if (name, index) not in done]):
                watchdog.beat(f"{path.stem}: sampling")
                yield rollout

        rollouts = completed(path, EpisodeRollout, list(wanted), key=lambda rollout: (rollout.task_id, rollout.index), make=play)
        if len(rollouts) < len(wanted):
            assert preemption.requested(), "fewer episodes ended than were begun"
            return None
        return [rollouts[start : start + size] for start in range(0, len(rollouts), size)]

    def _play(self, step: int, wanted: Sequence[tuple[Trajectory, int]]) -> Iterator[EpisodeRollout]:
        """Every (task, sample index) as an episode, in the order in which they end."""
        begun = (
            episodes.Episode(task.task_id, index, build_environment(self.config.domain, task.state), task.tools) for task, index in wanted
        )

        def request(episode: episodes.Episode, prompt: tuple[int, ...]) -> SampleRequest:
            rollout = self.config.rollout
            return SampleRequest(
                prompt=prompt,
                n=1,
                seed=seed_of(self.config.seed, "e2e", step, episode.task_id, episode.index, len(episode.turns)),
                max_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                stop_token_ids=self.sampler.renderer.stop_ids,
                routing_key=f"{episode.task_id}:{episode.index}",
            )

        for episode in episodes.run(self.sampler, begun, request, max_turns=self.config.e2e.max_turns):
            yield EpisodeRollout(
                task_id=episode.task_id,
                index=episode.index,
                reward=episode.reward,
                end=episode.end,
                turns=tuple(episode.turns),
                error=episode.error,
                environment_s=episode.environment_s,
            )

    def items(self, groups: Sequence[Sequence[EpisodeRollout]]) -> list[Item]:
        judged = [[(rollout.reward, episode_items(rollout)) for rollout in group if rollout.end != "error"] for group in groups]
        return scored_items(judged, self.config.algorithm)

    def statistics(self, groups: Sequence[Sequence[EpisodeRollout]]) -> dict[str, Any]:
        return episode_statistics(groups)

    def versions(self, groups: Sequence[Sequence[EpisodeRollout]]) -> list[int]:
        return [turn.completion.policy_version for group in groups for rollout in group for turn in rollout.turns]

    def probes(self, count: int) -> list[list[int]]:
        """The longest histories of experts that the rollout service takes."""
        return [self._expert_history(task) for task in step_pivots(self.tasks, count, step=0, seed=self.config.seed)]

    def _expert_history(self, task: Trajectory) -> list[int]:
        tokens: list[int] = []
        for turn, message in enumerate(task.messages):
            if message.role == "assistant":
                prompt = self.sampler.renderer.prompt(task.messages[:turn], task.tools)
                if tokens and len(prompt) > self.config.rollout.max_prompt_tokens:
                    break
                tokens = prompt
        return tokens


def sequences(rollout: EpisodeRollout) -> Iterator[tuple[tuple[int, ...], Completion]]:
    """(prompt, completion) of every turn, with the prompts written out."""
    tokens: tuple[int, ...] = ()
    for turn in rollout.turns:
        prompt = tokens[: turn.shared] + turn.prompt
        yield prompt, turn.completion
        tokens = prompt + turn.completion.token_ids


def episode_items(rollout: EpisodeRollout) -> list[Item]:
    """One item a turn, together one unit, so that the turns' growing history stands once in a row."""
    unit = f"{rollout.task_id}:{rollout.index}"
    return [action_item(prompt, completion, unit=unit) for prompt, completion in sequences(rollout)]


def episode_statistics(groups: Sequence[Sequence[EpisodeRollout]]) -> dict[str, Any]:
    """Rewards, their deviation, dead groups, how episodes end and what they cost. Every action of the policy is a rollout turn."""
    rollouts = [rollout for group in groups for rollout in group]
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    judged = [[rollout.reward for rollout in group if rollout.end != "error"] for group in groups]
    rewards = [reward for group in judged for reward in group]
    ends = Counter(rollout.end for rollout in rollouts)
    return {
        "reward_mean": mean(rewards),
        "reward_std": mean([moments(group)[1] ** 0.5 for group in judged if group]),
        "dead_group_share": mean([not has_signal(group) for group in judged]),
        "dropped_samples": ends["error"],
        "truncation_rate": mean([turn.completion.finish_reason == "length" for turn in turns]),
        "calls_per_reply": mean([turn.num_calls for turn in turns]),
        "message_turn_share": mean([turn.num_calls == 0 for turn in turns]),
        "completion_tokens_mean": mean([len(turn.completion.token_ids) for turn in turns]),
        "rollout_turns": len(turns),
        "rollout_tokens": sum(len(turn.completion.token_ids) for turn in turns),
        "prompt_tokens_mean": mean([len(prompt) for rollout in rollouts for prompt, _ in sequences(rollout)]),
        "episodes": len(rollouts),
        "turns_per_episode": mean([len(rollout.turns) for rollout in rollouts]),
        **{f"episodes_{end}": ends[end] for end in ("done", "max_turns", "over_long", "error")},
        "environment_s": sum(rollout.environment_s for rollout in rollouts),
    }
