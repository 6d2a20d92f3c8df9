"""The losses. Each takes the policy's logprobs of a row's scored tokens and returns a sum, ready to be differentiated.

Every scored token carries a weight that already holds the normalisation (1 / all tokens, or 1 / (sequences * length)),
so that a batch's loss is the plain sum over its rows, whatever the rows, microbatches and ranks.
"""

import torch
from torch import Tensor

from pivotrl.config import AlgorithmConfig


def sft_loss(logprobs_S: Tensor, fields: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted negative log-likelihood of the expert's tokens."""
    loss = -(fields["weights"] * logprobs_S).sum()
    return loss, {"loss": loss.detach()}


def grpo_loss(logprobs_S: Tensor, fields: dict[str, Tensor], algorithm: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate with truncated importance sampling and a k3 KL penalty to the reference policy.

    The penalty's value is KL(pi || pi_0) on average, its gradient that of KL(pi_0 || pi): docs/theory.md.

    J = E[min(w A, clip(w, 1 - clip_low, 1 + clip_high) A)] - beta KL(pi || pi_0), token level (method, section 3);
    each token is multiplied by min(pi_old / pi_rollout, importance_cap), which corrects trainer/engine drift and rollouts of an
    older policy: the update is that of actions drawn from pi_old, but for the truncation (importance_cap None: no correction).

    Args:
        logprobs_S: policy logprobs of the S scored tokens, with gradient.
        fields: weights, advantages, rollout_logprobs; old_logprobs when the policy has moved since the rollout
            (else the present logprobs, detached); ref_logprobs when kl_beta > 0.

    Returns:
        The loss (a sum) and weighted sums of diagnostics, to be added up over rows and ranks.
    """
    weights, advantages, rollout = fields["weights"], fields["advantages"], fields["rollout_logprobs"]
    old = fields.get("old_logprobs", logprobs_S.detach())
    ratio = torch.exp(logprobs_S - old)
    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    importance = torch.exp(old - rollout)
    capped = torch.zeros_like(importance, dtype=torch.bool)
    if algorithm.importance_cap is not None:
        capped = importance > algorithm.importance_cap
        surrogate = surrogate * importance.clamp(max=algorithm.importance_cap)
    per_token = -surrogate
    metrics = {
        "clip_fraction": (weights * (ratio * advantages > clipped * advantages)).sum(),
        "importance_mean": (weights * importance).sum(),
        "capped_share": (weights * capped).sum(),
        "entropy": -(weights * logprobs_S.detach()).sum(),  # of sampled tokens: an unbiased estimate on policy
        "weight": weights.sum(),
        "logprob_gap": (weights * (old - rollout).abs()).sum(),
        "logprob_gap_max": (old - rollout).abs().max() if len(old) else old.sum(),
    }
    if algorithm.kl_beta > 0:
        log_ratio = fields["ref_logprobs"] - logprobs_S
        kl = torch.exp(log_ratio) - log_ratio - 1
        per_token = per_token + algorithm.kl_beta * kl
        metrics["kl"] = (weights * kl.detach()).sum()
    loss = (weights * per_token).sum()
    return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}
