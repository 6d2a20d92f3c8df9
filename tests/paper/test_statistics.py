"""Means, errors and crossings against values worked out by hand."""

import statistics

import pytest

from pivotrl.paper.results import Cost, Point, Result
from pivotrl.paper.statistics import (
    Difference,
    deviation,
    equal_success,
    mean_curve,
    reach,
    skill_change,
    standard_error,
    success_difference,
)


def result(tasks=(1, 0), seed=0, skills=(0.5,), curve=()):
    values = {str(i): float(value) for i, value in enumerate(tasks)}
    evaluation = {"task_success": sum(tasks) / len(tasks), "skills": {str(i): value for i, value in enumerate(skills)}}
    points = tuple(Point(i, Cost(x, 10 * x, x / 10), y) for i, (x, y) in enumerate(curve))
    return Result("cell", seed, values, evaluation, curve=points)


def test_deviation_is_the_samples():
    values = [0.1, 0.5, 0.6]
    assert deviation(values) == pytest.approx(statistics.stdev(values))
    assert standard_error(values) == pytest.approx(statistics.stdev(values) / 3**0.5)
    assert deviation([1.0]) is None and standard_error([]) is None


@pytest.mark.parametrize(("mean", "error", "sign"), [(0.5, 0.2, 1), (-0.5, 0.2, -1), (0.4, 0.2, 0), (0.5, None, 0), (0.0, 0.0, 0)])
def test_a_difference_counts_beyond_two_errors_only(mean, error, sign):
    assert Difference(mean, error).sign == sign


def test_success_is_paired_and_keeps_the_larger_error():
    one = {0: result((1, 1, 1, 0)), 1: result((1, 1, 0, 0)), 7: result((1, 1, 1, 1))}
    other = {0: result((1, 0, 0, 0)), 1: result((1, 0, 0, 0)), 8: result((0, 0, 0, 0))}
    found = success_difference(one, other)
    assert found.mean == pytest.approx((0.5 + 0.25) / 2), "seeds 7 and 8 have no partner"
    by_seed, by_task = standard_error([0.5, 0.25]), standard_error([0, 1, 0.5, 0])
    assert found.error == pytest.approx(max(by_seed, by_task)) and by_task > by_seed
    assert success_difference(one, {}) is None and success_difference({0: one[0]}, {0: one[0]}).mean == 0


def test_skills_are_paired_by_seed():
    base, after = {0: result(skills=(0.2, 0.4)), 1: result(skills=(0.6, 0.8))}, {0: result(skills=(0.1, 0.4)), 1: result(skills=(0.3, 0.8))}
    found = skill_change(after, base)
    assert found.mean == pytest.approx((-0.05 - 0.15) / 2) and found.error == pytest.approx(0.05)


def test_reaching_a_level_is_linear_between_points():
    curve = result(curve=[(100, 0.2), (200, 0.4), (300, 0.3), (400, 0.9)]).curve
    assert reach(curve, 0.3) == Cost(150, 1500, 15), "the first time, not the last"
    assert reach(curve, 0.6).turns == pytest.approx(350)
    assert reach(curve, 0.2).turns == 100 and reach(curve, 0.95) is None


def test_mean_curve_takes_the_steps_of_all_seeds():
    found = mean_curve({0: result(curve=[(0, 0.0), (10, 0.5), (20, 1.0)]), 1: result(curve=[(0, 0.2), (30, 0.7)]), 2: result()})
    assert [(p.step, p.cost.turns, p.success) for p in found] == [(0, 0, 0.1), (1, 20, 0.6)]
    assert mean_curve({0: result()}) == []


def test_equal_success_by_hand():
    """Common level 0.6: e2e reaches its best there at 4000; PivotRL, which starts at 400, half-way between 400 and 800."""
    pivotrl, e2e = {0: result(curve=[(400, 0.2), (800, 1.0)])}, {0: result(curve=[(0, 0.2), (2000, 0.4), (4000, 0.6)])}
    found = equal_success(pivotrl, e2e)
    assert found["level"] == 0.6 and found["pivotrl"] == pytest.approx(600) and found["e2e"] == 4000
    assert found["profiling"] == 400 and found["training_ratio"] == pytest.approx(4000 / 200)
    assert found["ratio"] == pytest.approx(4000 / 600) and found["wall_ratio"] == pytest.approx(400 / 60) and found["reason"] is None


@pytest.mark.parametrize(
    ("curve", "reason"),
    [([(0, 0.5), (9, 0.5), (19, 0.4)], "e2e never rises above pi_0's 0.500"), ([], "e2e has no curve"), ([(0, 0.5)], "e2e has no curve")],
)
def test_no_common_level_is_null_with_the_reason(curve, reason):
    found = equal_success({0: result(curve=[(400, 0.2), (800, 1.0)])}, {0: result(curve=curve)})
    assert found["ratio"] is found["pivotrl"] is found["wall_ratio"] is found["level"] is None and found["reason"].startswith(reason)
