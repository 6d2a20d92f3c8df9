"""Group-relative advantages (method: A_i = (r_i - mean) / (std + eps), or the leave-one-out baseline)."""

from collections.abc import Sequence

from pivotrl.config import AdvantageKind


def has_signal(rewards_G: Sequence[float]) -> bool:
    """Whether a group can move the policy: two samples at least, and not all rewards equal (Proposition 3.1)."""
    return len(rewards_G) > 1 and max(rewards_G) != min(rewards_G)


def moments(rewards: Sequence[float]) -> tuple[float, float]:
    """Mean and population variance (0 for none); equal rewards have variance 0 without rounding dust."""
    mean = sum(rewards) / len(rewards) if rewards else 0.0
    variance = sum((reward - mean) ** 2 for reward in rewards) / len(rewards) if has_signal(rewards) else 0.0
    return mean, variance


def advantages(rewards_G: Sequence[float], kind: AdvantageKind, eps: float) -> list[float]:
    """One advantage per sample; zeros for a group without variance.

    group: (r - mean) / (population std + eps). leave_one_out: r - mean of the others (RLOO), not normalised.
    """
    if not has_signal(rewards_G):
        return [0.0] * len(rewards_G)
    count = len(rewards_G)
    mean, variance = moments(rewards_G)
    if kind == AdvantageKind.leave_one_out:
        return [(r - mean) * count / (count - 1) for r in rewards_G]
    return [(r - mean) / (variance**0.5 + eps) for r in rewards_G]
