"""Megatron's optimizer, with an Adam for machines where neither Transformer Engine nor Apex is installed."""

import math
from typing import Any

import torch

from pivotrl.config import OptimizerConfig, PrecisionConfig


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW that keeps its step in the param group, as FusedAdam does.

    With torch.optim.AdamW's per-parameter step Megatron's distributed optimizer cannot be loaded from a checkpoint.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, **_: Any):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None, **_: Any) -> None:
        for group in self.param_groups:
            group["step"] = step = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            (beta1, beta2), lr = group["betas"], group["lr"]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, math.sqrt(1 - beta2**step))
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(params, means, roots, -lr / (1 - beta1**step))


def _use_group_step_adam() -> None:
    """Put GroupStepAdamW where Megatron looks FusedAdam up, if it found no fused one."""
    import megatron.core.optimizer as core
    import megatron.core.optimizer.distrib_optimizer as distributed

    if core.USING_PYTORCH_OPTIMIZER:
        core.Adam, core.USING_PYTORCH_OPTIMIZER = GroupStepAdamW, False
        distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = GroupStepAdamW, True, True


def build_optimizer(chunks: list, config: OptimizerConfig, precision: PrecisionConfig) -> Any:
    """Megatron's distributed Adam over the DDP-wrapped model chunks; norm weights do not decay (Megatron's standard)."""
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

    _use_group_step_adam()
    bf16 = precision.params == "bf16"
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr if config.min_lr is None else config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(settings, chunks, get_standard_config_overrides(settings))
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group["wd_mult"]  # what Megatron's own scheduler would do at each step
        group.setdefault("step", 0)
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not inner.is_stub_optimizer:  # else a checkpoint before the first update could not be written
            inner.init_state_fn(inner.optimizer, inner.config)
    return optimizer


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then cosine from lr to min_lr over `num_steps`, or constant where min_lr is None."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.min_lr is None:
        return config.lr
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
