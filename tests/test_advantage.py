import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivotrl.advantage import advantages, has_signal
from pivotrl.config import AdvantageKind

REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=1, max_size=16)


def test_group_advantages_by_hand():
    # mean 0.25, population std sqrt(3)/4
    assert advantages([1, 0, 0, 0], AdvantageKind.group, 0.0) == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])
    assert advantages([1, 0], AdvantageKind.group, 0.5) == pytest.approx([0.5, -0.5])


def test_leave_one_out_advantages_by_hand():
    assert advantages([1, 0, 0, 0], AdvantageKind.leave_one_out, 1e-6) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert advantages([1, 0.5], AdvantageKind.leave_one_out, 1e-6) == pytest.approx([0.5, -0.5])


@given(REWARDS)
def test_formulas(rewards):
    group = advantages(rewards, AdvantageKind.group, 1e-6)
    without = advantages(rewards, AdvantageKind.leave_one_out, 1e-6)
    assert sum(group) == pytest.approx(0, abs=1e-9) and sum(without) == pytest.approx(0, abs=1e-9)
    if not has_signal(rewards):
        assert group == without == [0.0] * len(rewards)
        return
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    assert group == pytest.approx([(r - mean) / (std + 1e-6) for r in rewards])
    others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
    assert without == pytest.approx([r - statistics.fmean(rest) for r, rest in zip(rewards, others, strict=True)])


@pytest.mark.parametrize("kind", AdvantageKind)
@pytest.mark.parametrize("rewards", [[], [1.0], [0.0] * 16, [1.0] * 3, [0.1] * 3])
def test_equal_rewards_give_exactly_zero(rewards, kind):
    """Proposition 3.1, also where the mean of equal rewards is not that reward in floating point (0.1 three times)."""
    assert not has_signal(rewards)
    assert advantages(rewards, kind, 1e-6) == [0.0] * len(rewards)
