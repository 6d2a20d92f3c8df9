"""Means with deviations over seeds, paired differences with their standard errors, and where two curves reach the same level."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pivotrl.paper.results import Cost, Point, Result

SIGMAS = 2.0  # a difference of so many standard errors counts


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True)
class Difference:
    """A paired difference: its mean, and a standard error; None where one value says nothing about its own error."""

    mean: float
    error: float | None

    @property
    def sign(self) -> int:
        """1 or -1 where it exceeds two standard errors, else 0: it could be chance."""
        if self.error is None or abs(self.mean) <= SIGMAS * self.error or self.mean == 0:
            return 0
        return 1 if self.mean > 0 else -1


def standard_error(values: Sequence[float]) -> float | None:
    found = deviation(values)
    return None if found is None else found / math.sqrt(len(values))


def success_difference(one: Mapping[int, Result], other: Mapping[int, Result]) -> Difference | None:
    """Task success of `one` less that of `other`, paired by seed and task.

    Two errors are known: of the mean over seeds, and of the mean over held-out tasks; the larger is given. None without a common seed.
    """
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    by_seed = [one[seed].success - other[seed].success for seed in seeds]
    tasks = sorted(set.intersection(*(set(result[seed].tasks) for result in (one, other) for seed in seeds)))
    by_task = [mean([one[seed].tasks[task] - other[seed].tasks[task] for seed in seeds]) for task in tasks]
    return Difference(mean(by_seed), _larger(standard_error(by_seed), standard_error(by_task)))


def skill_change(result: Mapping[int, Result], base: Mapping[int, Result]) -> Difference | None:
    """Mean accuracy on the unrelated skills less that of pi_0, paired by seed (each asks other examples); None without a pair."""
    seeds = sorted(set(result) & set(base))
    if not seeds:
        return None
    changes = [mean(list(skill_changes(result[seed], base[seed]).values())) for seed in seeds]
    return Difference(mean(changes), standard_error(changes))


def greedy(results: Mapping[int, Result]) -> dict[int, Result]:
    """The seeds that were evaluated without sampling, too."""
    return {seed: result.greedy for seed, result in results.items() if result.greedy is not None}


def skill_changes(result: Result, base: Result) -> dict[str, float]:
    """Accuracy less that of pi_0 by family."""
    return {family: result.skills[family] - accuracy for family, accuracy in base.skills.items()}


def _larger(*errors: float | None) -> float | None:
    return max((error for error in errors if error is not None), default=None)


def mean_curve(results: Mapping[int, Result]) -> list[Point]:
    """The mean over seeds at the steps that all seeds have."""
    curves = [{point.step: point for point in result.curve} for result in results.values() if result.curve]
    if not curves:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    found = []
    for step in steps:
        points = [curve[step] for curve in curves]
        cost = Cost(*(mean([getattr(point.cost, name) for point in points]) for name in ("turns", "tokens", "wall_s")))
        found.append(Point(step, cost, mean([point.success for point in points])))
    return found


def reach(curve: Sequence[Point], level: float) -> Cost | None:
    """What it cost to reach a level first, linear between points; None if it never does."""
    for i, point in enumerate(curve):
        if point.success >= level:
            if i == 0:
                return point.cost
            before = curve[i - 1]
            part = (level - before.success) / (point.success - before.success)
            names = ("turns", "tokens", "wall_s")
            return Cost(*(getattr(before.cost, n) + part * (getattr(point.cost, n) - getattr(before.cost, n)) for n in names))
    return None


def equal_success(pivotrl: Mapping[int, Result], e2e: Mapping[int, Result]) -> dict[str, float | str | None]:
    """Turns and seconds until the smaller of the two methods' best mean success; null with a reason when there is no such level.

    PivotRL's curve begins at what its profiling cost, end-to-end RL's at nothing. `training_ratio` leaves that cost (`profiling`) out.
    """
    empty = dict.fromkeys(("level", "pivotrl", "profiling", "e2e", "ratio", "training_ratio", "pivotrl_wall_s", "e2e_wall_s", "wall_ratio"))
    curves = {"pivotrl": mean_curve(pivotrl), "e2e": mean_curve(e2e)}
    for name, curve in curves.items():
        if len(curve) < 2 or curve[0].step != 0:
            return empty | {"reason": f"{name} has no curve from pi_0 on: held-out tasks were not run during its training"}
        best = max(point.success for point in curve)
        if best <= curve[0].success:
            return empty | {"reason": f"{name} never rises above pi_0's {curve[0].success:.3f}, so there is no common level above it"}
    level = min(max(point.success for point in curve) for curve in curves.values())
    ours, theirs = reach(curves["pivotrl"], level), reach(curves["e2e"], level)
    assert ours is not None and theirs is not None, "both reach the smaller of their best levels"
    profiling = curves["pivotrl"][0].cost.turns
    return {
        "level": level,
        "pivotrl": ours.turns,
        "profiling": profiling,
        "e2e": theirs.turns,
        "ratio": theirs.turns / ours.turns,
        "training_ratio": theirs.turns / (ours.turns - profiling),
        "pivotrl_wall_s": ours.wall_s,
        "e2e_wall_s": theirs.wall_s,
        "wall_ratio": theirs.wall_s / ours.wall_s,
        "reason": None,
    }
