"""What is offloaded is really gone, and training with it in between gives the same bits as without."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from layouts import make_policy, random_items, splits  # noqa: E402

from pivotrl.loss import sft_loss  # noqa: E402
from pivotrl.megatron.offload import state_tensors  # noqa: E402
from pivotrl.megatron.optimizer import parts  # noqa: E402


def trained(*, offloading: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and optimizer state after three updates, with logprobs and an export read while the rest was away."""
    policy = make_policy()
    rows = splits(random_items())["shared"]
    for row in rows:
        row.fields = {"weights": torch.full((len(row.positions_S),), 1 / 100)}
    for step in range(3):
        policy.train_step(rows, sft_loss, temperature=1.0, step=step)
        if offloading:
            before, weights = policy.logprobs(rows, temperature=1.0), dict(policy.hf_weights())
            weights = {name: tensor.clone() for name, tensor in weights.items()}
            policy.offload()
            policy.offload()
            assert all(torch.equal(a, b) for a, b in zip(before, policy.logprobs(rows, temperature=1.0), strict=True))
            assert all(torch.equal(weights[name], tensor) for name, tensor in policy.hf_weights())
            policy.reload()
            policy.reload()
    return [p.detach().clone() for p in policy.parameters()], [tensor.clone() for tensor in state_tensors(policy.optimizer)]


def test_training_goes_on_to_the_same_bits():
    (weights, state), (expected, expected_state) = trained(offloading=True), trained(offloading=False)
    assert len(state) == len(expected_state) > 10 and any(tensor.abs().max() > 0 for tensor in state)
    assert all(torch.equal(a, b) for a, b in zip([*weights, *state], [*expected, *expected_state], strict=True))


def test_gradients_and_moments_are_gone_meanwhile():
    policy = make_policy()
    state = list(state_tensors(policy.optimizer))
    held = {id(value) for inner in parts(policy.optimizer) for entry in inner.optimizer.state.values() for value in entry.values()}
    buffers = [buffer for chunk in policy.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    sizes = [tensor.untyped_storage().nbytes() for tensor in (*state, *(buffer.grad_data for buffer in buffers))]
    assert len(state) == len(held) and min(sizes) > 0
    moments = [tensor.clone() for tensor in state]
    policy.offload()
    assert not any(tensor.untyped_storage().nbytes() for tensor in (*state, *(buffer.grad_data for buffer in buffers)))
    policy.reload()
    assert [tensor.untyped_storage().nbytes() for tensor in (*state, *(buffer.grad_data for buffer in buffers))] == sizes
    assert all(torch.equal(a, b) for a, b in zip(state, moments, strict=True))


def test_fp32_weights_are_not_the_optimizers_to_move():
    """Their shards in the optimizer are views of the model: emptied, the model would be empty."""
    policy = make_policy()
    shards = [param for inner in parts(policy.optimizer) for group in inner.optimizer.param_groups for param in group["params"]]
    taken = {tensor.data_ptr() for tensor in state_tensors(policy.optimizer)}
    assert shards and not taken & {shard.data_ptr() for shard in shards}


@pytest.mark.parametrize("precision", ["bf16"])
def test_master_copies_go_along(precision):
    policy = make_policy(precision=precision)
    masters = [main for inner in parts(policy.optimizer) for group in inner.shard_fp32_from_float16_groups for main in group]
    kept = [main.detach().clone() for main in masters]
    policy.offload()
    assert masters and not any(main.untyped_storage().nbytes() for main in masters)
    policy.reload()
    assert all(torch.equal(main, copy) for main, copy in zip(masters, kept, strict=True))


def test_a_policy_that_only_scores_has_nothing_to_offload():
    policy, rows = make_policy(optimizer=None), splits(random_items())["shared"]
    before = policy.logprobs(rows, temperature=1.0)
    policy.offload()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.logprobs(rows, temperature=1.0), strict=True))
    policy.reload()
