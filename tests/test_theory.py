"""The theorems behind pivots, on policies small enough to enumerate; docs/theory.md states them and what the loss makes of them.

One state's policy is softmax(features_AD @ theta_D) over A actions in float64. Expectations over actions and over groups are sums over
all of them with their probabilities as weights, so nothing here is sampled, and the gradients are those of the project's own loss.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pivotrl.advantage import advantages, has_signal
from pivotrl.config import AdvantageKind, AlgorithmConfig, SelectionRule
from pivotrl.groups import group_items
from pivotrl.loss import grpo_loss
from pivotrl.profiling import summarise
from pivotrl.selection import fate
from pivotrl.types import Completion, Group, LocalRollout, Verdict

F64 = torch.float64
A, D, STATES = 5, 9, range(3)
BETAS = (0.2, 0.5, 1.0, 3.0, 10.0)
RELATIVE = 1e-6
GROUP = AlgorithmConfig(advantage=AdvantageKind.group, advantage_eps=0.0)
LEAVE_ONE_OUT = AlgorithmConfig(advantage=AdvantageKind.leave_one_out)


def close(got: Tensor | float, wanted: Tensor | float, tolerance: float = 1e-6) -> bool:
    return torch.allclose(torch.as_tensor(got, dtype=F64), torch.as_tensor(wanted, dtype=F64), rtol=tolerance, atol=tolerance)


def generator(state: int) -> torch.Generator:
    return torch.Generator().manual_seed(state)


def reference(state: int) -> Tensor:
    """log pi_0 of a state, far from uniform."""
    return torch.randn(A, generator=generator(state), dtype=F64).mul(0.8).log_softmax(0)


def rewards_of(state: int, kind: str) -> Tensor:
    drawn = torch.rand(A, generator=generator(100 + state), dtype=F64)
    return (drawn >= drawn.median()).to(F64) if kind == "binary" else drawn


def features(parameters: str) -> Tensor:
    """tabular: one logit an action. redundant: more parameters than actions. narrow: too few for every policy."""
    size = {"tabular": A, "redundant": D, "narrow": 2}[parameters]
    return torch.eye(A, dtype=F64) if parameters == "tabular" else torch.randn(A, size, generator=generator(7), dtype=F64)


def optimum(log_ref: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi_beta, pi_beta proportional to pi_0 exp(r / beta)."""
    return (log_ref + rewards / beta).log_softmax(0)


def theta_of(log_pi: Tensor, features_AD: Tensor) -> Tensor:
    return torch.linalg.lstsq(features_AD, log_pi[:, None], driver="gelsd").solution[:, 0]


def log_policy(theta: Tensor, features_AD: Tensor) -> Tensor:
    return (features_AD @ theta).log_softmax(0)


def fisher(theta: Tensor, features_AD: Tensor) -> Tensor:
    """E_a[grad log pi(a) grad log pi(a)^T], [D, D]."""
    scores_AD = torch.autograd.functional.jacobian(lambda t: log_policy(t, features_AD), theta)
    return scores_AD.T @ (log_policy(theta, features_AD).exp()[:, None] * scores_AD)


def natural_norm(gradient: Tensor, metric: Tensor) -> float:
    """sqrt(v^T F v) of the natural gradient v = F^+ gradient."""
    natural = torch.linalg.pinv(metric, hermitian=True, rtol=1e-12) @ gradient
    return (natural @ metric @ natural).sqrt().item()


def gradient_of(value: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    leaf = theta.clone().requires_grad_()
    return torch.autograd.grad(value(leaf), leaf)[0]


def deviation(log_pi: Tensor, rewards: Tensor) -> float:
    """sqrt(Var_a r) under a policy."""
    pi = log_pi.exp()
    return (pi @ (rewards - pi @ rewards) ** 2).sqrt().item()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def expected_loss_gradient(
    theta: Tensor, features_AD: Tensor, rewards: Tensor, algorithm: AlgorithmConfig, *, size: int, log_ref: Tensor, behaviour: Tensor
) -> Tensor:
    """Expected gradient of grpo_loss over all groups of `size` actions drawn from `behaviour` (log probabilities)."""
    groups_NG = torch.tensor(list(itertools.product(range(A), repeat=size)))
    chances_N = behaviour[groups_NG].sum(1).exp()
    given_NG = [advantages(rewards[group].tolist(), algorithm.advantage, algorithm.advantage_eps) for group in groups_NG]
    actions_S = groups_NG.flatten()
    fields = {
        "weights": (chances_N[:, None].expand(-1, size) / size).flatten(),
        "advantages": torch.tensor(given_NG, dtype=F64).flatten(),
        "rollout_logprobs": behaviour[actions_S],
        "ref_logprobs": log_ref[actions_S],
    }
    return gradient_of(lambda t: grpo_loss(log_policy(t, features_AD)[actions_S], fields, algorithm)[0], theta)


def on_policy_gradient(theta: Tensor, rewards: Tensor, algorithm: AlgorithmConfig, *, size: int = 2, log_ref: Tensor) -> Tensor:
    """`expected_loss_gradient` of a tabular policy that the groups are drawn from."""
    table, present = features("tabular"), log_policy(theta, features("tabular"))
    return expected_loss_gradient(theta, table, rewards, algorithm, size=size, log_ref=log_ref, behaviour=present)


# Proposition 3.1


@pytest.mark.parametrize("kind", AdvantageKind)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_equal_rewards_give_no_advantage_and_no_gradient(kind, size):
    algorithm, table = AlgorithmConfig(advantage=kind), features("tabular")
    theta = reference(0)
    actions_S = torch.arange(size) % A
    logprobs_S = log_policy(theta, table)[actions_S]
    fields = {"weights": torch.full((size,), 1 / size, dtype=F64), "rollout_logprobs": logprobs_S - 0.3, "old_logprobs": logprobs_S - 0.1}

    def gradient(rewards: list[float]) -> Tensor:
        fields["advantages"] = torch.tensor(advantages(rewards, kind, algorithm.advantage_eps), dtype=F64)
        return gradient_of(lambda t: grpo_loss(log_policy(t, table)[actions_S], fields, algorithm)[0], theta)

    for reward in (0.0, 1.0, 0.1, 1 / 3, 0.7):
        assert advantages([reward] * size, kind, algorithm.advantage_eps) == [0.0] * size
        assert not gradient([reward] * size).any(), "exactly zero"
    if size > 1:
        assert gradient([0.1] * (size - 1) + [0.3]).abs().max() > 1e-2, "one other reward and there is a gradient"


# Theorem 3.2


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["uniform", "binary"])
@pytest.mark.parametrize("parameters", ["tabular", "redundant"])
def test_natural_gradient_norm_is_the_reward_deviation(beta, kind, parameters):
    table = features(parameters)
    for state in STATES:
        rewards = rewards_of(state, kind)
        log_pi = optimum(reference(state), rewards, beta)
        theta = theta_of(log_pi, table)
        assert close(log_policy(theta, table), log_pi, 1e-12)
        gradient = gradient_of(lambda t, rewards=rewards: log_policy(t, table).exp() @ rewards, theta)
        norm, wanted = natural_norm(gradient, fisher(theta, table)), deviation(log_pi, rewards)
        assert wanted > 1e-3 and norm / beta**2 == pytest.approx(wanted / beta**2, rel=RELATIVE)


@pytest.mark.parametrize("beta", BETAS)
def test_the_path_moves_against_the_natural_gradient_at_that_speed(beta):
    """d log pi_beta / d beta = -(r - E r) / beta^2: where the division by beta^2 comes from."""
    step, table = 1e-4 * beta, features("tabular")
    for state in STATES:
        log_ref, rewards = reference(state), rewards_of(state, "uniform")
        log_pi = optimum(log_ref, rewards, beta)
        velocity = (optimum(log_ref, rewards, beta + step) - optimum(log_ref, rewards, beta - step)) / (2 * step)
        gradient = gradient_of(lambda t, rewards=rewards: log_policy(t, table).exp() @ rewards, log_pi)
        natural = torch.linalg.pinv(fisher(log_pi, table), hermitian=True, rtol=1e-12) @ gradient
        centred = natural - log_pi.exp() @ natural  # what adding `natural` to the logits does to log pi
        assert close(velocity * beta**2, -centred)
        assert (log_pi.exp() @ velocity**2).sqrt().item() * beta**2 == pytest.approx(deviation(log_pi, rewards), rel=RELATIVE)


def test_perturbed_statements_fail():
    """Another norm, another objective, another policy's variance, or a policy that cannot express the direction."""
    beta, table, narrow = 0.5, features("tabular"), features("narrow")
    for state in STATES:
        log_ref, rewards = reference(state), rewards_of(state, "uniform")
        log_pi = optimum(log_ref, rewards, beta)
        wanted, metric = deviation(log_pi, rewards), fisher(log_pi, table)
        gradient = gradient_of(lambda t, rewards=rewards: log_policy(t, table).exp() @ rewards, log_pi)
        natural = torch.linalg.pinv(metric, hermitian=True, rtol=1e-12) @ gradient
        others = [gradient.norm().item(), natural.norm().item(), wanted**2, deviation(log_ref, rewards)]
        assert all(abs(other / wanted - 1) > 1e-2 for other in others)

        def regularised(t, rewards=rewards, log_ref=log_ref):
            return log_policy(t, table).exp() @ rewards - beta * kl(log_policy(t, table), log_ref)

        assert natural_norm(gradient_of(regularised, log_pi), metric) < 1e-9, "at pi_beta the regularised objective is at its maximum"
        theta = torch.tensor([0.3, -0.2], dtype=F64)
        part = natural_norm(gradient_of(lambda t, rewards=rewards: log_policy(t, narrow).exp() @ rewards, theta), fisher(theta, narrow))
        assert part < 0.99 * deviation(log_policy(theta, narrow), rewards), "two parameters see a projection of the reward only"


def test_over_several_states_squared_norms_add_up():
    """J = sum_s d(s) J_s with separate parameters: the squared norm is the mean over states of Var_a r."""
    share = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    pairs = [(optimum(reference(s), rewards_of(s, "uniform"), 0.7), rewards_of(s, "uniform")) for s in STATES]
    table = features("tabular")
    metric = torch.block_diag(*(d * fisher(log_pi, table) for d, (log_pi, _) in zip(share, pairs, strict=True)))
    gradients = [gradient_of(lambda t, r=r: log_policy(t, table).exp() @ r, log_pi) for log_pi, r in pairs]
    gradient = torch.cat([d * g for d, g in zip(share, gradients, strict=True)])
    variances = torch.tensor([deviation(log_pi, r) ** 2 for log_pi, r in pairs], dtype=F64)
    assert natural_norm(gradient, metric) ** 2 == pytest.approx((share @ variances).item(), rel=RELATIVE)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", ["uniform", "binary"])
def test_the_loss_has_that_natural_gradient(size, kind):
    """Leave-one-out: the expected gradient of the project's loss is that of -J_s, so its natural norm is the reward deviation."""
    table = features("redundant")
    for state, beta in zip(STATES, (0.2, 1.0, 10.0), strict=True):
        rewards = rewards_of(state, kind)
        log_pi = optimum(reference(state), rewards, beta)
        theta = theta_of(log_pi, table)
        got = expected_loss_gradient(theta, table, rewards, LEAVE_ONE_OUT, size=size, log_ref=log_pi, behaviour=log_pi)
        assert close(got, -gradient_of(lambda t, rewards=rewards: log_policy(t, table).exp() @ rewards, theta), 1e-12)
        norm = natural_norm(got, fisher(theta, table))
        assert norm / beta**2 == pytest.approx(deviation(log_pi, rewards) / beta**2, rel=RELATIVE)


def expected_group_deviation(rho: float, size: int) -> float:
    """Mean standard deviation inside a group of `size` binary rewards."""
    chances = [math.comb(size, k) * rho**k * (1 - rho) ** (size - k) for k in range(size + 1)]
    return sum(chance * math.sqrt(k / size * (1 - k / size)) for k, chance in enumerate(chances))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_divided_by_the_group_deviation_the_direction_stays_and_the_length_changes(size):
    """Advantage kind `group`, binary rewards: the gradient of -J_s times E[std in the group] / Var_a r, so a norm of at most 1."""
    for state in STATES:
        log_pi, rewards = reference(state), rewards_of(state, "binary")
        sigma = deviation(log_pi, rewards)
        inside = expected_group_deviation((log_pi.exp() @ rewards).item(), size)
        got = on_policy_gradient(log_pi, rewards, GROUP, size=size, log_ref=log_pi)
        plain = on_policy_gradient(log_pi, rewards, LEAVE_ONE_OUT, size=size, log_ref=log_pi)
        assert close(got, plain * inside / sigma**2, 1e-12)
        norm = natural_norm(got, fisher(log_pi, features("tabular")))
        assert norm == pytest.approx(inside / sigma, rel=RELATIVE) and norm <= math.sqrt((size - 1) / size) + 1e-12


def test_with_rewards_of_many_values_dividing_turns_the_direction():
    log_pi, rewards = reference(1), rewards_of(1, "uniform")
    got, plain = (on_policy_gradient(log_pi, rewards, algorithm, size=3, log_ref=log_pi) for algorithm in (GROUP, LEAVE_ONE_OUT))
    assert torch.cosine_similarity(got, plain, dim=0) < 1 - 1e-3


def test_rollouts_of_an_older_policy_give_the_same_reward_gradient_until_the_cap():
    log_pi, rewards, old = reference(0), rewards_of(0, "uniform"), reference(1)
    table = features("tabular")
    wanted = on_policy_gradient(log_pi, rewards, LEAVE_ONE_OUT, log_ref=log_pi)
    for cap, equal in ((100.0, True), (1.0, False), (None, False)):
        algorithm = AlgorithmConfig(advantage=AdvantageKind.leave_one_out, importance_cap=cap)
        got = expected_loss_gradient(log_pi, table, rewards, algorithm, size=2, log_ref=log_pi, behaviour=old)
        assert close(got, wanted, 1e-12 if equal else 1e-3) == equal


# Selection


@pytest.mark.parametrize("kind", AdvantageKind)
def test_mixed_keeps_exactly_the_turns_with_signal(kind):
    """All 81 outcomes of four samples with rewards in {0, 0.5, 1}: kept if and only if the loss on those samples has a gradient."""
    table, log_pi, algorithm = features("tabular"), reference(2), AlgorithmConfig(advantage=kind)
    kept = 0
    for rewards in itertools.product((0.0, 0.5, 1.0), repeat=4):
        group = group_of(range(4), log_pi, dict(enumerate(rewards)))
        profile = summarise("turn", list(group.rollouts), [rollout.verdict for rollout in group.rollouts], 1)
        gradient = training_gradient(log_pi, table, [(1.0, group)], algorithm, log_ref=log_pi)
        assert (fate(profile, SelectionRule.mixed, 1.0) == "kept") == has_signal(rewards) == bool(gradient.abs().max() > 1e-3)
        assert gradient.any() or profile.variance == 0
        for max_mean in (0.3, 0.6):
            assert (fate(profile, SelectionRule.mixed, max_mean) == "kept") == (has_signal(rewards) and profile.mean < max_mean)
        kept += has_signal(rewards)
    assert kept == 78


def group_of(actions, log_pi: Tensor, rewards) -> Group:
    """Actions of one token each, with the logprobs of the policy that drew them."""
    rollouts = tuple(
        LocalRollout(
            candidate_id="turn",
            index=i,
            completion=Completion(token_ids=(a,), logprobs=(log_pi[a].item(),), finish_reason="stop", policy_version=0),
            text="",
            verdict=Verdict(reward=float(rewards[a]), reason=""),
        )
        for i, a in enumerate(actions)
    )
    return Group(candidate_id="turn", trajectory_id="t", expert_calls=0, prompt=(0,), rollouts=rollouts)


def training_gradient(theta: Tensor, table: Tensor, groups: list[tuple[float, Group]], algorithm: AlgorithmConfig, *, log_ref: Tensor):
    """Gradient of the loss on the items that training makes of (chance, group) pairs: groups without signal give none."""
    found = [(chance, item) for chance, group in groups for item in group_items([group], algorithm)]
    if not found:
        return torch.zeros_like(theta)
    actions_S = torch.tensor([item.token_ids[-1] for _, item in found])
    fields = {
        name: torch.tensor([item.fields[name][0] for _, item in found], dtype=F64) for name in ("weights", "advantages", "rollout_logprobs")
    }
    fields["weights"] = fields["weights"] * torch.tensor([chance for chance, _ in found], dtype=F64)
    fields["ref_logprobs"] = log_ref[actions_S]
    return gradient_of(lambda t: grpo_loss(log_policy(t, table)[actions_S], fields, algorithm)[0], theta)


# Theorem 3.3


def minimised(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Logits at the minimum, by L-BFGS and a few Newton steps on the objective alone."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=100, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(theta)
        value.backward()
        return value

    optimizer.step(closure)
    found = theta.detach()
    for _ in range(6):
        hessian = torch.autograd.functional.hessian(objective, found)
        found = found - torch.linalg.pinv(hessian, hermitian=True, rtol=1e-10) @ gradient_of(objective, found)
    assert gradient_of(objective, found).abs().max() < 1e-12, "not converged"
    return found


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", ["uniform", "binary"])
def test_the_minimiser_is_the_tilted_reference(beta, kind):
    for state in STATES:
        log_ref, rewards = reference(state), rewards_of(state, kind)

        def objective(theta, log_ref=log_ref, rewards=rewards):
            log_pi = theta.log_softmax(0)
            return -(log_pi.exp() @ rewards) + beta * kl(log_pi, log_ref)

        found = minimised(objective, torch.randn(A, generator=generator(50 + state), dtype=F64)).log_softmax(0)
        wanted = optimum(log_ref, rewards, beta)
        assert close(found.exp(), wanted.exp()) and close(found, wanted)
        lowest = objective(wanted)
        assert close(lowest, -beta * torch.logsumexp(log_ref + rewards / beta, 0), 1e-12)
        others = torch.randn(200, A, generator=generator(state), dtype=F64)
        assert all(objective(wanted + other) > lowest for other in others)


@pytest.mark.parametrize("beta", BETAS)
def test_mass_moves_onto_acceptable_actions_and_ratios_stay(beta):
    for state in STATES:
        log_ref, rewards = reference(state), rewards_of(state, "binary")
        inside = rewards == 1
        rho = log_ref.exp()[inside].sum().item()
        log_pi = minimised(lambda t, r=rewards, ref=log_ref: -(t.softmax(0) @ r) + beta * kl(t.log_softmax(0), ref), log_ref).log_softmax(0)
        q = log_pi.exp()[inside].sum().item()
        assert 0.05 < rho < 0.95 and q > rho
        assert q == pytest.approx(rho * math.exp(1 / beta) / (rho * math.exp(1 / beta) + 1 - rho), abs=1e-6)
        assert abs(q - rho * math.exp(1.01 / beta) / (rho * math.exp(1.01 / beta) + 1 - rho)) > 1e-5, "the test tells betas apart"
        for part in (inside, ~inside):
            assert part.sum() > 1 and close((log_pi - log_ref)[part], (log_pi - log_ref)[part][0])
        assert abs((log_pi - log_ref)[inside][0] - (log_pi - log_ref)[~inside][0] - 1 / beta) < 1e-6


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_where_all_or_no_actions_are_acceptable_nothing_moves(reward):
    log_ref, rewards = reference(0), torch.full((A,), reward, dtype=F64)
    log_pi = minimised(lambda t: -(t.softmax(0) @ rewards) + 0.5 * kl(t.log_softmax(0), log_ref), torch.zeros(A, dtype=F64)).log_softmax(0)
    assert close(log_pi, log_ref) and close(optimum(log_ref, rewards, 0.5), log_ref, 1e-12)


# The project's KL penalty


def penalty(beta: float, kind: AdvantageKind = AdvantageKind.leave_one_out) -> AlgorithmConfig:
    return AlgorithmConfig(advantage=kind, advantage_eps=0.0, kl_beta=beta)


def test_k3_has_the_value_of_one_divergence_and_the_gradient_of_the_other():
    """On policy E[k3] = KL(pi || pi_0), but the gradient of the loss is that of KL(pi_0 || pi)."""
    table = features("tabular")
    for state in STATES:
        log_ref, log_pi, no_reward = reference(state), reference(state + 10), torch.zeros(A, dtype=F64)
        fields = {"weights": log_pi.exp(), "advantages": no_reward, "rollout_logprobs": log_pi, "ref_logprobs": log_ref}
        assert close(grpo_loss(log_pi, fields, penalty(1.0))[1]["kl"], kl(log_pi, log_ref), 1e-12)
        got = on_policy_gradient(log_pi, no_reward, penalty(0.3), log_ref=log_ref)
        assert close(got, 0.3 * gradient_of(lambda t, ref=log_ref: kl(ref, log_policy(t, table)), log_pi), 1e-12)
        method = 0.3 * gradient_of(lambda t, ref=log_ref: kl(log_policy(t, table), ref), log_pi)
        assert (got - method).abs().max() > 1e-2, "not the gradient of the method's KL(pi || pi_0)"
        assert close(got, 0.3 * (log_pi.exp() - log_ref.exp()), 1e-12), "bounded by beta"


def test_near_the_reference_both_gradients_agree_to_first_order():
    table, log_ref = features("tabular"), reference(0)
    direction = torch.randn(A, generator=generator(1), dtype=F64)
    gaps = []
    for distance in (1e-2, 1e-3, 1e-4):
        log_pi = (log_ref + distance * direction).log_softmax(0)
        got = on_policy_gradient(log_pi, torch.zeros(A, dtype=F64), penalty(1.0), log_ref=log_ref)
        method = gradient_of(lambda t: kl(log_policy(t, table), log_ref), log_pi)
        assert got.abs().max() > 0.01 * distance
        gaps.append((got - method).abs().max().item() / distance**2)
    assert gaps == pytest.approx([gaps[0]] * 3, rel=0.05), "the gap is quadratic in the distance"


def test_what_would_follow_the_methods_divergence():
    """(log pi - log pi_0)^2 / 2 per sample, differentiated as k3 is, has the gradient of KL(pi || pi_0)."""
    table, log_ref, log_pi = features("tabular"), reference(0), reference(1)
    got = gradient_of(lambda t: (log_pi.exp() * (log_policy(t, table) - log_ref) ** 2 / 2).sum(), log_pi)
    assert close(got, gradient_of(lambda t: kl(log_policy(t, table), log_ref), log_pi), 1e-12)


def test_rollouts_of_an_older_policy_are_not_corrected_in_the_penalty():
    table, log_ref, log_pi, old = features("tabular"), reference(0), reference(1), reference(2)
    got = expected_loss_gradient(log_pi, table, torch.zeros(A, dtype=F64), penalty(1.0), size=2, log_ref=log_ref, behaviour=old)
    weighed = gradient_of(lambda t: (old.exp() * (log_ref - log_policy(t, table)).expm1()).sum() + old.exp() @ log_policy(t, table), log_pi)
    assert (
        close(got, weighed, 1e-12)
        and (got - on_policy_gradient(log_pi, torch.zeros(A, dtype=F64), penalty(1.0), log_ref=log_ref)).norm() > 0.1
    )


def settled(rewards: Tensor, algorithm: AlgorithmConfig, log_ref: Tensor) -> Tensor:
    """log pi where training with the exact expected gradient of the project's loss ends, by natural gradient steps."""
    theta, step = log_ref.clone(), 0.5 / (1 + algorithm.kl_beta)
    for _ in range(2000):
        gradient = on_policy_gradient(theta, rewards, algorithm, log_ref=log_ref)
        if gradient.abs().max() < 1e-12:
            break
        theta = (theta - step * torch.linalg.pinv(fisher(theta, features("tabular")), hermitian=True, rtol=1e-12) @ gradient).log_softmax(0)
    assert gradient.abs().max() < 1e-10, "not converged"
    return theta


@pytest.mark.parametrize("beta", [0.2, 1.0, 10.0])
def test_where_the_loss_settles(beta):
    """At beta pi_0 / (mu - r), not at Theorem 3.3's policy: the mass rises and ratios stay, q is another, and alike for large beta."""
    log_ref, rewards = reference(0), rewards_of(0, "binary")
    found, inside = settled(rewards, penalty(beta), log_ref), rewards == 1
    rho, q = log_ref.exp()[inside].sum().item(), found.exp()[inside].sum().item()
    own = ((1 - beta) + math.sqrt((1 - beta) ** 2 + 4 * beta * rho)) / 2
    theorem = rho * math.exp(1 / beta) / (rho * math.exp(1 / beta) + 1 - rho)
    assert q == pytest.approx(own, abs=1e-6) and q > rho
    assert abs(q - theorem) > 1e-4 and abs(q - theorem) < 0.5 * (theorem - rho)
    for part in (inside, ~inside):
        assert close((found - log_ref)[part], (found - log_ref)[part][0])
    mu = beta * (1 - rho) / (1 - q)
    assert close(found.exp(), beta * log_ref.exp() / (mu - rewards))


def test_where_the_loss_settles_for_rewards_of_many_values():
    log_ref, rewards, beta = reference(1), rewards_of(1, "uniform"), 0.5
    found = settled(rewards, penalty(beta), log_ref).exp()
    mus = rewards + beta * log_ref.exp() / found
    assert close(mus, mus[0]) and (found - optimum(log_ref, rewards, beta).exp()).abs().max() > 1e-2
    minimum = minimised(lambda t: -(t.softmax(0) @ rewards) + beta * kl(log_ref, t.log_softmax(0)), log_ref).softmax(0)
    assert close(found, minimum), "the minimum of -E r + beta KL(pi_0 || pi)"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", AdvantageKind)
def test_training_settles_where_groups_without_signal_are_left_out(kind, size):
    """As training runs: such groups carry no penalty either. Binary rewards: c(q) = beta (q - rho) (m_1 / q + m_0 / (1 - q))."""
    table, log_ref, rewards, algorithm = features("tabular"), reference(0), rewards_of(0, "binary"), penalty(0.4, kind)
    inside = rewards == 1
    rho = log_ref.exp()[inside].sum().item()

    def pull(q: float) -> float:
        reward = 1.0 if kind == AdvantageKind.leave_one_out else expected_group_deviation(q, size) / (q * (1 - q))
        return reward - 0.4 * (q - rho) * ((1 - q ** (size - 1)) / q + (1 - (1 - q) ** (size - 1)) / (1 - q))

    def gradient_at(q: float) -> Tensor:
        log_pi = log_ref + rewards * math.log(q / rho) + (1 - rewards) * math.log((1 - q) / (1 - rho))
        groups = [(log_pi[list(actions)].sum().exp().item(), group_of(actions, log_pi, rewards)) for actions in every_group]
        return training_gradient(log_pi, table, groups, algorithm, log_ref=log_ref)

    every_group = list(itertools.product(range(A), repeat=size))
    low, high = rho, 1 - 1e-9
    assert pull(low) > 0 > pull(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if pull(middle) > 0 else (low, middle)
    assert gradient_at(low).abs().max() < 1e-9 and low > rho + 0.05, "ratios stay and the mass rises"
    assert gradient_at(low - 0.01).abs().max() > 1e-4 and gradient_at(low + 0.01).abs().max() > 1e-4


def test_over_two_tokens_the_penalty_stops_at_each_token():
    """Two-token actions: E r has the gradient of J over the length; the penalty is each token's KL at the policy's own prefixes, whose
    dependence on the policy is left out."""
    size, beta = 2, 0.3
    theta, log_ref_theta = (
        torch.randn(4, 3, generator=generator(seed), dtype=F64) for seed in (1, 2)
    )  # first token, then one row a prefix
    rewards = torch.rand(3, 3, generator=generator(3), dtype=F64)
    pairs = torch.tensor(list(itertools.product(range(9), repeat=size)))  # groups of two of the nine actions
    actions_S = pairs.flatten()

    def token_logprobs(t: Tensor) -> Tensor:
        """[9, 2]: log pi of both tokens of every action."""
        table = t.log_softmax(1)
        return torch.stack([table[0].repeat_interleave(3), table[1:].flatten()], 1)

    present, ref = token_logprobs(theta), token_logprobs(log_ref_theta)
    chances_9 = present.sum(1).exp()
    given = [advantages(rewards.flatten()[pair].tolist(), AdvantageKind.leave_one_out, 0.0) for pair in pairs]
    weights_S = (chances_9[pairs].prod(1)[:, None] / size).expand(-1, size).flatten()
    fields = {
        "weights": weights_S.repeat_interleave(2) / 2,
        "advantages": torch.tensor(given, dtype=F64).flatten().repeat_interleave(2),
        "rollout_logprobs": present[actions_S].flatten(),
        "ref_logprobs": ref[actions_S].flatten(),
    }
    got = gradient_of(lambda t: grpo_loss(token_logprobs(t)[actions_S].flatten(), fields, penalty(beta))[0], theta)
    prefixes_4 = torch.cat([torch.ones(1, dtype=F64), theta[0].softmax(0)])  # of theta as it is: no gradient through them

    def stated(t: Tensor) -> Tensor:
        divergences_4 = (log_ref_theta.softmax(1) * (log_ref_theta.log_softmax(1) - t.log_softmax(1))).sum(1)
        return (-(token_logprobs(t).sum(1).exp() @ rewards.flatten()) + beta * prefixes_4 @ divergences_4) / 2

    assert close(got, gradient_of(stated, theta), 1e-12)
