"""Verdicts follow the numbers: the same claim holds, fails or stays open when the numbers change."""

import pytest

from pivotrl.paper.claims import FAILS, HOLDS, OPEN, judge
from pivotrl.paper.results import Cost, Point, Result

TASKS = 100


def cell(solved, *, skill=0.5, curve=(), deviation=(), dead=None):
    """Three seeds; skills move by a little with the seed, in every cell alike."""
    found = {}
    for seed, count in enumerate(solved):
        tasks = {str(i): float(i < count) for i in range(TASKS)}
        level = skill[seed] if isinstance(skill, tuple) else skill
        points = tuple(Point(i, Cost(x, x, x / 100), y) for i, (x, y) in enumerate(curve))
        evaluation = {"task_success": count / TASKS, "skills": {"add": level, "sort": level}}
        found[seed] = Result("x", seed, tasks, evaluation, curve=points, deviations=deviation, counts={"dead_turn_share": dead})
    return found


def verdicts(**results):
    return {claim.claim: claim.verdict for claim in judge(results)}


def one(text, **results):
    (claim,) = (claim for claim in judge(results) if text in claim.claim)
    return claim


@pytest.mark.parametrize(("sft", "verdict"), [((40, 41, 42), HOLDS), ((59, 60, 61), OPEN), ((75, 76, 80), FAILS), ((20, 60, 95), OPEN)])
def test_better_than_sft(sft, verdict):
    claim = one("beats SFT", pivotrl=cell((60, 60, 61)), sft=cell(sft))
    assert claim.verdict == verdict and "63.81 (2nd)" in claim.paper


def test_a_single_seed_still_has_the_error_over_tasks():
    assert one("beats SFT", pivotrl=cell((60,)), sft=cell((30,))).verdict == HOLDS
    assert one("beats SFT", pivotrl=cell((60,)), sft=cell((59,))).verdict == OPEN


@pytest.mark.parametrize(("skill", "verdict"), [((0.2, 0.21, 0.22), HOLDS), ((0.6, 0.61, 0.6), FAILS), ((0.3, 0.5, 0.68), OPEN)])
def test_sft_loses_skills(skill, verdict):
    base, sft, gentle = cell((1, 1, 1)), cell((1, 1, 1), skill=skill), cell((1, 1, 1), skill=0.48)
    assert one("SFT loses", base=base, sft=sft).verdict == one("SFT loses", base=base, sft=sft, sft_gentle=gentle).verdict == verdict
    told = one("SFT loses", base=base, sft=sft, sft_gentle=gentle).sentence
    assert "At a third of its learning rate: \N{MINUS SIGN}2.0 points" in told
    assert "At a third" not in one("SFT loses", base=base, sft=sft).sentence


@pytest.mark.parametrize(("skill", "verdict"), [((0.5, 0.51, 0.49), HOLDS), ((0.4, 0.41, 0.4), FAILS), ((0.4, 0.5, 0.6), OPEN)])
def test_keeping_skills_needs_a_loss_ruled_out(skill, verdict):
    claim = one("PivotRL loses nothing", base=cell((1, 1, 1)), pivotrl=cell((1, 1, 1), skill=skill), sft=cell((1, 1, 1), skill=0.5))
    assert claim.verdict == verdict
    assert ("does not tell the two apart" in claim.sentence) == (verdict == HOLDS), "SFT kept its skills here as well"


@pytest.mark.parametrize(("e2e", "verdict"), [((60, 60, 60), HOLDS), ((80, 82, 81), FAILS), ((50, 70, 62), OPEN)])
def test_as_good_as_end_to_end(e2e, verdict):
    assert one("as good as end-to-end", pivotrl=cell((60, 60, 60)), e2e=cell(e2e), base=cell((20, 20, 20))).verdict == verdict


def test_as_good_as_nothing_is_no_claim():
    """Two policies that both solve nothing are equal, and two without skills lose none."""
    results = {name: cell((0, 0, 0), skill=0.01) for name in ("base", "e2e", "pivotrl")}
    equal, kept = one("as good as end-to-end", **results), one("PivotRL loses nothing", **results)
    assert (equal.verdict, kept.verdict) == (OPEN, OPEN) and "says little" in equal.sentence and "nothing to lose" in kept.sentence


@pytest.mark.parametrize(
    ("e2e_turns", "verdict", "words"),
    [(4000, HOLDS, "factor of 4.00."), (2000, FAILS, "not by that factor"), (500, FAILS, "does not need less")],
)
def test_fewer_turns(e2e_turns, verdict, words):
    pivotrl, e2e = cell((60,), curve=[(600, 0.4), (1000, 0.6)]), cell((60,), curve=[(0, 0.4), (e2e_turns, 0.6)])
    claim = one("fewer rollout turns", pivotrl=pivotrl, e2e=e2e)
    assert claim.verdict == verdict and words in claim.sentence


def test_without_a_common_level_nothing_is_said():
    claim = one("less time", pivotrl=cell((60,), curve=[(600, 0.4), (1000, 0.3)]), e2e=cell((60,), curve=[(0, 0.4), (900, 0.6)]))
    assert claim.verdict == OPEN and "never rises" in claim.sentence


def test_signal_and_deviation():
    high, low = cell((1, 1), deviation=(0.4, 0.3), dead=0.7), cell((1, 1), deviation=(0.2, 0.1), dead=0.2)
    assert one("no signal", pivotrl=high).verdict == HOLDS and one("no signal", pivotrl=low).verdict == FAILS
    assert one("reward deviation", pivotrl=high, random=low).verdict == HOLDS
    assert one("reward deviation", pivotrl=low, random=high).verdict == FAILS
    assert one("reward deviation", pivotrl={0: high[0], 1: low[1]}, random={0: low[0], 1: high[1]}).verdict == OPEN


def test_cells_that_are_not_there_claim_nothing():
    assert verdicts() == {} and verdicts(base=cell((1,))) == {}
    assert list(verdicts(strict=cell((10, 11)), pivotrl=cell((60, 61)))) == ["Functional reward helps"]
