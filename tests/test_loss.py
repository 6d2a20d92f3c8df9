"""The losses against numbers worked out by hand, a reference written as a loop, and finite differences."""

import math

import pytest
import torch

from pivotrl.config import AlgorithmConfig
from pivotrl.loss import grpo_loss, sft_loss

ALGORITHMS = {
    "plain": AlgorithmConfig(),
    "no_cap": AlgorithmConfig(importance_cap=None),
    "tight_cap": AlgorithmConfig(importance_cap=1.02),
    "asymmetric": AlgorithmConfig(clip_low=0.05, clip_high=0.28),
    "kl": AlgorithmConfig(kl_beta=0.3),
    "kl_no_cap": AlgorithmConfig(kl_beta=2.0, importance_cap=None, clip_low=0.1),
}


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_token(logprob: float, *, advantage: float, algorithm: AlgorithmConfig, **fields: float) -> tuple[float, float, dict]:
    """(loss, gradient, metrics) of one token of weight 1 whose rollout, old and reference logprobs are -1 unless given."""
    logprobs = tensor([logprob]).requires_grad_()
    given = {"weights": 1.0, "advantages": advantage, "rollout_logprobs": -1.0, "old_logprobs": -1.0, "ref_logprobs": -1.0} | fields
    loss, metrics = grpo_loss(logprobs, {name: tensor([value]) for name, value in given.items()}, algorithm)
    loss.backward()
    return loss.item(), logprobs.grad.item(), metrics


def reference(logprobs, fields, algorithm: AlgorithmConfig) -> dict[str, float]:
    """The objective of method, section 3, token by token in plain Python."""
    sums = dict.fromkeys(("loss", "clip_fraction", "importance_mean", "capped_share", "entropy", "weight", "logprob_gap", "kl"), 0.0)
    gaps = []
    for s, logprob in enumerate(logprobs):
        weight, advantage, rollout = (fields[name][s] for name in ("weights", "advantages", "rollout_logprobs"))
        old = fields["old_logprobs"][s] if "old_logprobs" in fields else logprob
        ratio = math.exp(logprob - old)
        inside = min(max(ratio, 1 - algorithm.clip_low), 1 + algorithm.clip_high)
        importance = math.exp(old - rollout)
        factor = 1.0 if algorithm.importance_cap is None else min(importance, algorithm.importance_cap)
        kl = math.exp(fields["ref_logprobs"][s] - logprob) - (fields["ref_logprobs"][s] - logprob) - 1
        sums["loss"] -= weight * (factor * min(ratio * advantage, inside * advantage) - algorithm.kl_beta * kl)
        sums["clip_fraction"] += weight * (inside * advantage < ratio * advantage)
        sums["importance_mean"] += weight * importance
        sums["capped_share"] += weight * (algorithm.importance_cap is not None and importance > algorithm.importance_cap)
        sums["entropy"] -= weight * logprob
        sums["weight"] += weight
        sums["logprob_gap"] += weight * abs(old - rollout)
        sums["kl"] += weight * kl
        gaps.append(abs(old - rollout))
    if algorithm.kl_beta == 0:
        del sums["kl"]
    return sums | {"logprob_gap_max": max(gaps)}


def random_batch(seed: int, *, level: str = "token", moved: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Five sequences of different lengths; ratios on both sides of the clip bounds."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [3, 7, 1, 5, 4]
    count = sum(lengths)
    weights = [1 / count] * count if level == "token" else [1 / (len(lengths) * n) for n in lengths for _ in range(n)]

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(count, generator=rng, dtype=torch.float64)

    logprobs = -noise(1.0).abs()
    old = logprobs + noise(0.3)
    fields = {
        "weights": tensor(weights),
        "advantages": torch.repeat_interleave(torch.randn(5, generator=rng, dtype=torch.float64), torch.tensor(lengths)),
        "rollout_logprobs": (old if moved else logprobs) + noise(0.1),
        "ref_logprobs": logprobs + noise(0.5),
    }
    return logprobs, fields | ({"old_logprobs": old} if moved else {})


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_grpo_loss_equals_the_loop(name, level, moved):
    for seed in range(5):
        logprobs, fields = random_batch(seed, level=level, moved=moved)
        loss, metrics = grpo_loss(logprobs, fields, ALGORITHMS[name])
        expected = reference(logprobs.tolist(), {key: column.tolist() for key, column in fields.items()}, ALGORITHMS[name])
        assert loss.item() == pytest.approx(expected["loss"], rel=1e-12)
        assert {key: value.item() for key, value in metrics.items()} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_equals_finite_differences(name):
    logprobs, fields = random_batch(11)
    logprobs.requires_grad_()
    grpo_loss(logprobs, fields, ALGORITHMS[name])[0].backward()
    for s in range(len(logprobs)):
        step = torch.zeros_like(logprobs)
        step[s] = 1e-6
        up, down = (grpo_loss(logprobs.detach() + sign * step, fields, ALGORITHMS[name])[0].item() for sign in (1, -1))
        assert logprobs.grad[s].item() == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-9)


def test_on_policy_gradient_is_the_policy_gradient():
    logprobs, fields = random_batch(3, moved=False)
    logprobs.requires_grad_()
    loss, metrics = grpo_loss(logprobs, fields | {"rollout_logprobs": logprobs.detach()}, AlgorithmConfig())
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -fields["weights"] * fields["advantages"])
    assert metrics["clip_fraction"] == 0 and metrics["logprob_gap_max"] == 0
    assert metrics["importance_mean"].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the bounds: d(-w A)/d log w = -w A
        (1.3, 2.0, -2.4, 0.0),  # good action already raised by 30 %: held at 1.2 A
        (0.7, 2.0, -1.4, -1.4),  # good action that has lost mass: pulled back up
        (0.7, -2.0, 1.6, 0.0),  # bad action already lowered by 30 %: held at 0.8 A
        (1.3, -2.0, 2.6, 2.6),  # bad action that has gained mass: pushed down, unclipped
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, gradient):
    got = one_token(math.log(ratio) - 1, advantage=advantage, algorithm=AlgorithmConfig())
    assert got[:2] == (pytest.approx(loss), pytest.approx(gradient, abs=1e-12))
    assert got[2]["clip_fraction"] == (ratio != 1.1 and gradient == 0)


def test_importance_weight_and_its_cap_by_hand():
    shifted = {"rollout_logprobs": -1 - math.log(8)}  # the trainer gives the action 8 times the engine's probability
    for cap, factor in ((5.0, 5.0), (10.0, 8.0), (None, 1.0)):  # None: no correction at all
        loss, gradient, metrics = one_token(-1.0, advantage=1.0, algorithm=AlgorithmConfig(importance_cap=cap), **shifted)
        assert (loss, gradient) == (pytest.approx(-factor), pytest.approx(-factor))
        assert metrics["importance_mean"].item() == pytest.approx(8) and metrics["logprob_gap"].item() == pytest.approx(math.log(8))
        assert metrics["capped_share"] == (cap == 5.0)


def test_rollouts_of_an_older_policy_give_the_gradient_of_the_present_one():
    """Actions of a stale policy, weighted by the correction, average to the policy gradient of actions drawn from the present policy."""
    present, stale = tensor([0.7, 0.2, 0.1]).log(), tensor([0.4, 0.35, 0.25]).log()
    advantages = tensor([1.0, -0.5, 2.0])
    gradients = []
    for behaviour in (present, stale):
        logits = present.clone().requires_grad_()
        logprobs = logits.log_softmax(0)
        fields = {"weights": behaviour.exp(), "advantages": advantages, "rollout_logprobs": behaviour}  # each action, as often as drawn
        grpo_loss(logprobs, fields, AlgorithmConfig())[0].backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.1


def test_kl_penalty_by_hand():
    # k3 = r - log r - 1 with r = pi_0 / pi = 2; its gradient in log pi is 1 - r
    loss, gradient, metrics = one_token(
        -1.0, advantage=0.0, algorithm=AlgorithmConfig(kl_beta=0.5), ref_logprobs=math.log(2) - 1, old_logprobs=-1.0
    )
    assert metrics["kl"].item() == pytest.approx(1 - math.log(2))
    assert (loss, gradient) == (pytest.approx(0.5 * (1 - math.log(2))), pytest.approx(-0.5))


def test_kl_penalty_is_no_part_of_the_importance_correction():
    apart = {"ref_logprobs": math.log(2) - 1, "rollout_logprobs": -2.0}
    assert one_token(-1.0, advantage=0.0, algorithm=AlgorithmConfig(kl_beta=0.5), **apart)[0] == pytest.approx(0.5 * (1 - math.log(2)))


def test_golden_numbers_of_two_tokens():
    fields = {"weights": [0.25, 0.75], "advantages": [1.0, -1.0], "rollout_logprobs": [-0.5, -1.5], "old_logprobs": [-0.5, -1.0]}
    loss, metrics = grpo_loss(tensor([-0.4, -1.2]), {name: tensor(values) for name, values in fields.items()}, AlgorithmConfig())
    # 0.25 * -e^0.1 + 0.75 * e^0.5 * e^-0.2
    assert loss.item() == pytest.approx(-0.27629273 + 1.01239411, abs=1e-7)
    assert metrics["entropy"].item() == pytest.approx(0.25 * 0.4 + 0.75 * 1.2) and metrics["logprob_gap_max"] == 0.5


def test_groups_without_variance_change_nothing():
    """Proposition 3.1: with beta 0 their advantage is 0, so leaving their rows out keeps loss and gradient."""
    logprobs, fields = random_batch(7)
    fields["advantages"][3:11] = 0.0
    live = fields["advantages"] != 0
    results = []
    for chosen in (torch.ones_like(live), live):
        parameter = logprobs.clone().requires_grad_()
        loss, _ = grpo_loss(parameter[chosen], {name: column[chosen] for name, column in fields.items()}, AlgorithmConfig())
        loss.backward()
        results.append((loss.item(), parameter.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-14)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_a_batch_is_the_sum_of_its_rows():
    logprobs, fields = random_batch(5)
    whole, metrics = grpo_loss(logprobs, fields, AlgorithmConfig(kl_beta=0.1))
    parts = [
        grpo_loss(logprobs[s], {n: c[s] for n, c in fields.items()}, AlgorithmConfig(kl_beta=0.1)) for s in (slice(0, 6), slice(6, None))
    ]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts))
    for name in metrics.keys() - {"logprob_gap_max"}:
        assert metrics[name].item() == pytest.approx(sum(m[name].item() for _, m in parts))


def test_a_row_without_scored_tokens_costs_nothing():
    nothing = {name: tensor([]) for name in ("weights", "advantages", "rollout_logprobs")}
    loss, metrics = grpo_loss(tensor([]), nothing, AlgorithmConfig())
    assert loss == 0 and all(value == 0 for value in metrics.values())


def test_sft_loss_is_the_weighted_negative_log_likelihood():
    logprobs = tensor([-1.0, -2.0]).requires_grad_()
    loss, metrics = sft_loss(logprobs, {"weights": tensor([0.25, 0.75])})
    loss.backward()
    assert loss.item() == metrics["loss"].item() == 1.75 and not metrics["loss"].requires_grad
    assert logprobs.grad.tolist() == [-0.25, -0.75]
