"""Where a step's groups come from, which pivots it trains on, and which scored sequences its groups give."""

import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pivotrl import preemption, watchdog
from pivotrl.advantage import advantages, has_signal
from pivotrl.batching import Item, pack
from pivotrl.config import AlgorithmConfig, Config, LossLevel
from pivotrl.diagnostics import rollout_statistics
from pivotrl.local_rollouts import Sampler, seed_of
from pivotrl.records import completed, read_jsonl
from pivotrl.refresh import Refresher
from pivotrl.types import Completion, Group, LocalRollout, Pivot

if TYPE_CHECKING:
    from pivotrl.megatron.policy import Policy


class GroupSource(Protocol):
    """Gives the trainer groups of scored actions; lives on the main process. What a group is, only the source knows."""

    sampler: Sampler

    def sample(self, step: int) -> Sequence[Any] | None:
        """The step's groups, fresh or from the run folder; None when asked to leave meanwhile. May run on a thread of its own."""
        ...

    def items(self, groups: Sequence[Any]) -> list[Item]:
        """Scored sequences with weights, advantages and rollout logprobs; none for groups without signal."""
        ...

    def statistics(self, groups: Sequence[Any]) -> dict[str, Any]:
        """What metrics.jsonl keeps of them."""
        ...

    def versions(self, groups: Sequence[Any]) -> list[int]:
        """The policy version of every completion."""
        ...

    def probes(self, count: int) -> list[list[int]]:
        """Token ids of a few histories, always the same ones, for checks of engine and trainer."""
        ...


class StepGroups(list[Group]):
    """A step's groups with `paid`, the statistics of what else was sampled before them."""

    paid: dict[str, Any]


class PivotGroups:
    """The `GroupSource` of PivotRL: one group of one-turn actions for each of the step's pivots.

    With profile.refresh the pivots change on the way (pivotrl/refresh.py): steps are sampled in their order.
    """

    def __init__(self, config: Config, sampler: Sampler, pivots: Sequence[Pivot]):
        self.config, self.sampler, self.pivots = config, sampler, pivots
        self.refresher = Refresher(config, sampler, pivots, self.deviation) if config.profile.refresh else None
        self._deviations: dict[int, float] = {}

    def sample(self, step: int) -> StepGroups | None:
        pivots, since, paid = self.pivots, 0, {}
        if self.refresher is not None:
            try:
                pivots, since, paid = self.refresher.pivots_at(step)
            except preemption.Preempted:
                return None  # the processes leave together, when the trainer asks them
        chosen = step_pivots(pivots, self.config.algorithm.pivots_per_step, step=step - since, seed=self.config.seed)
        seed = seed_of(self.config.seed, "grpo", step)
        found = sample_groups(self.sampler, chosen, self._path(step), group_size=self.config.algorithm.group_size, seed=seed)
        if found is None:
            return None
        groups = StepGroups(found)
        groups.paid = paid
        return groups

    def deviation(self, step: int) -> float:
        """Mean over a sampled step's groups of the standard deviation of rewards inside the group."""
        if step not in self._deviations:
            self._deviations[step] = rollout_statistics(read_jsonl(self._path(step), Group))["reward_std"]
        return self._deviations[step]

    def _path(self, step: int) -> Path:
        return Path(self.config.run_dir) / "rollouts" / f"step_{step:06d}.jsonl"

    def items(self, groups: Sequence[Group]) -> list[Item]:
        return group_items(groups, self.config.algorithm)

    def statistics(self, groups: Sequence[Group]) -> dict[str, Any]:
        return rollout_statistics(groups) | (groups.paid if isinstance(groups, StepGroups) else {})

    def versions(self, groups: Sequence[Group]) -> list[int]:
        return [rollout.completion.policy_version for group in groups for rollout in group.rollouts]

    def probes(self, count: int) -> list[list[int]]:
        chosen = step_pivots(self.pivots, count, step=0, seed=self.config.seed)
        return [list(self.sampler.prompt(pivot.candidate)) for pivot in chosen]


def usable(pivots: Sequence[Pivot], max_prompt_tokens: int) -> list[Pivot]:
    """The pivots whose histories fit the rollout service; ValueError when there are none."""
    kept = [pivot for pivot in pivots if pivot.prompt_tokens <= max_prompt_tokens]
    if not kept:
        raise ValueError(f"none of {len(pivots)} pivots has a history of at most rollout.max_prompt_tokens={max_prompt_tokens} tokens")
    return kept


def step_pivots[T](pivots: Sequence[T], count: int, *, step: int, seed: int) -> list[T]:
    """The pivots (or tasks) of a step: epochs over all, each in an order of its own that only seed and epoch decide."""
    chosen: dict[int, T] = {}
    position = step * count
    while len(chosen) < min(count, len(pivots)):
        epoch, index = divmod(position, len(pivots))
        drawn = _epoch_order(len(pivots), seed, epoch)[index]
        chosen.setdefault(drawn, pivots[drawn])  # where two epochs meet, a pivot could come twice
        position += 1
    return list(chosen.values())


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(seed_of(seed, "epoch", epoch)).shuffle(order)
    return tuple(order)


def sample_groups(sampler: Sampler, pivots: Sequence[Pivot], path: Path, *, group_size: int, seed: int) -> list[Group] | None:
    """A group of rollouts per pivot, in their order, also written to `path`; read from there when it exists.

    None when the process was asked to leave before all were there. A journal beside `path` holds the finished groups, so that
    sampling goes on behind them, however it ended.
    """

    def sample(done: set[str]) -> Iterator[Group]:
        candidates = [pivot.candidate for pivot in pivots if pivot.candidate.id not in done]
        prompts = [sampler.prompt(candidate) for candidate in candidates]
        for index, rollouts, _ in sampler.collect(candidates, prompts, num_samples=group_size, seed=seed):
            watchdog.beat(f"{path.stem}: sampling")
            if preemption.requested() and any(rollout.verdict.status != "ok" for rollout in rollouts):
                continue  # the signal may have reached the verifier first
            candidate = candidates[index]
            yield Group(
                candidate_id=candidate.id,
                trajectory_id=candidate.trajectory_id,
                expert_calls=len(candidate.expert.tool_calls),
                prompt=prompts[index],
                rollouts=tuple(rollouts),
            )

    groups = completed(path, Group, [pivot.candidate.id for pivot in pivots], key=lambda group: group.candidate_id, make=sample)
    if len(groups) < len(pivots):
        assert preemption.requested(), "the sampler gave fewer groups than it was asked for"
        return None
    return groups


def group_items(groups: Sequence[Group], algorithm: AlgorithmConfig) -> list[Item]:
    """`scored_items` of one-turn actions: one item per rollout. Samples whose verifier failed are left out of everything."""
    return scored_items([[_sample(group, r) for r in group.rollouts if r.verdict.status == "ok"] for group in groups], algorithm)


def _sample(group: Group, rollout: LocalRollout) -> tuple[float, list[Item]]:
    return rollout.verdict.reward, [action_item(group.prompt, rollout.completion, unit=group.trajectory_id)]


def action_item(prompt: Sequence[int], completion: Completion, *, unit: str) -> Item:
    """An action behind its prompt, all of its tokens scored."""
    tokens, start = [*prompt, *completion.token_ids], len(prompt)
    return Item(tokens, range(start, len(tokens)), unit=unit, fields={"rollout_logprobs": list(completion.logprobs)})


def scored_items(groups: Sequence[Sequence[tuple[float, Sequence[Item]]]], algorithm: AlgorithmConfig) -> list[Item]:
    """Items of all groups with signal, with weights and advantages. A group's samples are (reward, the items with its action tokens).

    Every token of a sample has the sample's advantage; at the sequence level a sample is one sequence, however many items it has.
    Groups without signal cost nothing, but still count in the average. (Their gradient is zero, but for the KL penalty where
    kl_beta > 0, which is thus taken on groups with signal only.)
    """
    sizes = [sum(len(item.scored) for item in items) for group in groups for _, items in group]
    num_sequences, num_tokens = len(sizes), sum(sizes)
    found = []
    for group in groups:
        rewards = [reward for reward, _ in group]
        if not has_signal(rewards):
            continue
        for (_, items), advantage in zip(group, advantages(rewards, algorithm.advantage, algorithm.advantage_eps), strict=True):
            size = sum(len(item.scored) for item in items)
            for item in items:
                weight = 1 / num_tokens if algorithm.loss_level == LossLevel.token else 1 / (num_sequences * size)
                item.fields |= {"weights": [weight] * len(item.scored), "advantages": [advantage] * len(item.scored)}
                found.append(item)
    return found


def sharing_gap(policy: "Policy", prompt: Sequence[int], actions: Sequence[Sequence[int]], *, temperature: float) -> float:
    """Mean |difference| in nats between one group's logprobs in a shared-prefix row and in dense rows. Every process calls it."""
    start = len(prompt)
    items = [Item([*prompt, *action], range(start, start + len(action))) for action in actions]
    limit = sum(len(item.token_ids) for item in items)
    found: list[list[float]] = []
    for shared in (True, False):
        rows = pack(items, max_row_tokens=limit, shared_prefix=shared)
        entries = zip(rows, policy.logprobs(rows, temperature=temperature), strict=True)
        pairs = [pair for row, logprobs in entries for pair in zip(row.owners_S.tolist(), logprobs.tolist(), strict=True)]
        found.append([logprob for _, logprob in sorted(pairs, key=lambda pair: pair[0])])  # a stable sort keeps each item's order
    return sum(abs(a - b) for a, b in zip(*found, strict=True)) / len(found[0])


def check_sharing(policy: "Policy", probes: Sequence[Sequence[int]], config: Config) -> None:
    """Compute one group shared and dense: a gap over the tolerance stops the run, or turns sharing off if so configured."""
    prompt, *others = probes
    actions = [other[-16:] for other in others] or [prompt[-16:]]  # any tokens will do
    gap = sharing_gap(policy, prompt, actions, temperature=config.rollout.temperature)
    if gap <= config.rollout.max_mean_logprob_gap:
        return
    message = f"shared-prefix rows differ from dense rows by {gap:.2e} nats a token"
    if not config.batching.fall_back_to_dense:
        raise RuntimeError(f"{message}: set batching.shared_prefix=false, or batching.fall_back_to_dense=true to go on by itself")
    print(f"{message}: going on with dense rows", flush=True)
    config.batching.shared_prefix = False
