"""Adam, its learning rate, and what it leaves alone."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from layouts import OPTIMIZER, make_policy, random_items, splits, weights_of  # noqa: E402

from pivotrl.config import OptimizerConfig  # noqa: E402
from pivotrl.loss import sft_loss  # noqa: E402
from pivotrl.megatron.optimizer import GroupStepAdamW, learning_rate  # noqa: E402


def test_group_step_adamw_equals_torch():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(5, 3), (7,), (2, 2, 2)]]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    adams = GroupStepAdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            a.grad, b.grad = grad, grad.clone()
        for adam in adams:
            adam.step()
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-13
    assert adams[0].param_groups[0]["step"] == 5 and "step" not in adams[0].state[ours[0]]


def test_parameters_without_gradient_or_elements_are_left_alone():
    idle, empty = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.empty(0))
    empty.grad = torch.empty(0)
    adam = GroupStepAdamW([idle, empty], lr=1.0, weight_decay=0.5)
    adam.step()
    assert torch.equal(idle, torch.ones(3)) and not adam.state


SCHEDULES = {
    "constant": (OptimizerConfig(lr=2.0), {0: 2.0, 50: 2.0, 1000: 2.0}),
    "warmup": (OptimizerConfig(lr=2.0, warmup_steps=4), {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 99: 2.0}),
    "cosine": (
        OptimizerConfig(lr=2.0, min_lr=1.0, warmup_steps=20),
        {0: 0.1, 20: 2.0, 40: 1.5 + 0.125**0.5, 60: 1.5, 500: 1.0},
    ),
    "no decay left": (OptimizerConfig(lr=2.0, min_lr=1.0, warmup_steps=200), {99: 1.0, 200: 2.0}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate(name):
    config, expected = SCHEDULES[name]
    assert {step: learning_rate(config, step, 100) for step in expected} == pytest.approx(expected)


def test_learning_rate_reaches_the_update():
    policy, rows = make_policy(optimizer=replace(OPTIMIZER, warmup_steps=10, clip_grad=0.0)), splits(random_items())["one row"]
    before = weights_of(policy)
    metrics = policy.train_step(rows, sft_loss, temperature=1.0, step=4)
    assert metrics["learning_rate"] == pytest.approx(5e-4)
    moved = (weights_of(policy)["model.norm.weight"] - before["model.norm.weight"]).abs()
    assert moved.max() == pytest.approx(5e-4, rel=1e-2), "Adam's first step is the learning rate"


def test_weight_decay_spares_norms():
    policy, rows = make_policy(optimizer=replace(OPTIMIZER, weight_decay=0.5)), splits(random_items())["one row"]
    before = weights_of(policy)
    policy.train_step(rows, lambda logprobs_S, fields: (0.0 * logprobs_S.sum(), {}), temperature=1.0, step=0)
    for name, tensor in weights_of(policy).items():
        assert torch.allclose(tensor, before[name] * (1.0 if tensor.dim() == 1 else 1 - 1e-3 * 0.5), rtol=1e-6, atol=0.0), name
