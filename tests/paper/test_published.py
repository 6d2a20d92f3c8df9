"""The quoted numbers hang together, and every one wears its mark."""

import pytest

from pivotrl.paper import published
from pivotrl.paper.published import Quoted


def test_quotes_wear_their_marks():
    assert str(Quoted(20.0)) == "20.00 (2nd)" and str(published.RERUN_TAU2[0]) == "42.17 (src)"
    assert published.OUT_OF_DOMAIN_CHANGE["sft"].change == "\u22129.83 (2nd)" and published.WALL_RATIO.times == "5.5x (2nd)"


@pytest.mark.parametrize("method", ["sft", "pivotrl"])
def test_mean_gains_follow_from_the_table(method):
    gains = [after.value - before.value for before, after in zip(published.IN_DOMAIN["base"], published.IN_DOMAIN[method], strict=True)]
    assert len(gains) == len(published.BENCHMARKS)
    assert sum(gains) / len(gains) == pytest.approx(published.MEAN_GAIN[method].value, abs=0.01)


def test_ablations_and_ratio_follow_from_the_others():
    assert published.ABLATION_TAU2["pivotrl"] == published.IN_DOMAIN["pivotrl"][0]
    assert published.ABLATION_TAU2["sft"] == published.IN_DOMAIN["sft"][0]
    ratio = published.EQUAL_TURNS["e2e"].value / published.EQUAL_TURNS["pivotrl"].value
    assert ratio == pytest.approx(published.TURNS_RATIO.value, rel=0.03)
