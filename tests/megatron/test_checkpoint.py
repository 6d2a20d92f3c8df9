"""Checkpoints: training goes on bit for bit, in another layout within rounding, and a kill while writing costs nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import layouts  # noqa: E402
from layouts import distance, make_policy, measured, oracle_folder, random_items, single_checkpoint, splits, weights_of  # noqa: E402

from pivotrl.loss import sft_loss  # noqa: E402
from pivotrl.megatron import checkpoint  # noqa: E402


def train(policy, steps):
    rows = splits(random_items(1))["shared"]
    return [policy.train_step(rows, sft_loss, temperature=1.0, step=step) for step in steps]


def test_resumed_training_is_bit_identical():
    after = torch.load(oracle_folder() / "single_after.pt") if single_checkpoint() else None
    policy = make_policy()
    train(policy, range(1))  # the load must replace the optimizer's state too
    assert checkpoint.load(policy, checkpoint.latest(single_checkpoint())) == (2, 5)
    assert distance(weights_of(policy), torch.load(oracle_folder() / "single_before.pt")) == 0.0
    (metrics,) = train(policy, [2])
    assert distance(weights_of(policy), after["weights"]) == 0.0
    assert (metrics["loss"], metrics["grad_norm"]) == (after["metrics"]["loss"], after["metrics"]["grad_norm"])


def test_bf16_training_resumes_bit_identically(tmp_path):
    policy = make_policy(precision="bf16")
    train(policy, range(2))
    checkpoint.save(policy, tmp_path, 2)
    (expected,) = train(policy, [2])
    weights = weights_of(policy)
    fresh = make_policy(precision="bf16")
    checkpoint.load(fresh, checkpoint.latest(tmp_path))
    (found,) = train(fresh, [2])
    assert found["loss"] == expected["loss"] and found["grad_norm"] == expected["grad_norm"]
    assert distance(weights_of(fresh), weights) == 0.0


@pytest.mark.parametrize("name", layouts.RESUMED)
def test_single_checkpoint_loads_in_another_layout(name):
    found = measured(2)[name]
    assert (found["resumed at"], found["resumed version"]) == (2, 5)
    assert found["resumed weights"] == 0.0
    for quantity in ("resumed loss", "resumed grad_norm", "resumed step"):
        assert found[quantity] <= 1e-6, f"{quantity} {found[quantity]:.1e}"


@pytest.mark.parametrize("name", layouts.RESUMED)
def test_checkpoint_of_another_layout_loads_in_a_single_process(name):
    measured(2)
    policy, straight = make_policy(), make_policy()
    assert checkpoint.load(policy, checkpoint.latest(oracle_folder() / "checkpoints" / name)) == (3, 6)
    assert distance(weights_of(policy), torch.load(oracle_folder() / f"{name}_after.pt")) == 0.0
    checkpoint.load(straight, checkpoint.latest(single_checkpoint()))
    (_, expected), (found,) = train(straight, [2, 3]), train(policy, [3])
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert distance(weights_of(policy), weights_of(straight)) <= 1e-5


def test_policy_without_optimizer_loads_the_model_alone():
    policy = make_policy(optimizer=None)
    assert checkpoint.load(policy, checkpoint.latest(single_checkpoint())) == (2, 5)
    assert distance(weights_of(policy), torch.load(oracle_folder() / "single_before.pt")) == 0.0


def test_checkpoint_before_the_first_update(tmp_path):
    """A run whose first groups all carry no signal saves before it ever updates."""
    policy = make_policy()
    checkpoint.save(policy, tmp_path, 1)
    (expected,) = train(policy, [0])
    fresh = make_policy()
    train(fresh, range(2))
    checkpoint.load(fresh, checkpoint.latest(tmp_path))
    (found,) = train(fresh, [0])
    assert (found["loss"], found["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    assert distance(weights_of(fresh), weights_of(policy)) == 0.0


class Killed(BaseException):
    """The process ends here."""


def test_kill_between_write_and_rename_leaves_the_last_one_usable(tmp_path, monkeypatch):
    policy = make_policy()
    checkpoint.save(policy, tmp_path, 1)
    kept = weights_of(policy)
    train(policy, range(1))

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", die)
        checkpoint.save(policy, tmp_path, 2)
    assert (tmp_path / "step_000002.tmp").is_dir() and not (tmp_path / "step_000002").exists()
    newer = weights_of(policy)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000001"
    assert checkpoint.load(policy, checkpoint.latest(tmp_path)) == (1, 0)
    assert distance(weights_of(policy), kept) == 0.0
    assert distance(kept, newer) > 0.0
    assert checkpoint.save(policy, tmp_path, 2, version=3) == checkpoint.latest(tmp_path)
    assert not (tmp_path / "step_000002.tmp").exists()
    assert checkpoint.load(policy, checkpoint.latest(tmp_path)) == (2, 3)


def test_kill_before_latest_is_replaced_keeps_the_old_one_until_the_next_save(tmp_path, monkeypatch):
    policy = make_policy(optimizer=None)
    checkpoint.save(policy, tmp_path, 1)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "write_bytes", die)
        checkpoint.save(policy, tmp_path, 9)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000001"
    checkpoint.save(policy, tmp_path, 2, keep_last=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000002", "an orphaned later step must not push the new one out"
    assert checkpoint.load(policy, checkpoint.latest(tmp_path)) == (2, 0)


def test_older_checkpoints_are_removed(tmp_path):
    policy = make_policy(optimizer=None)
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2, 10):
        checkpoint.save(policy, tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002", "step_000010"]


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="step_000007"):
        checkpoint.load(make_policy(optimizer=None), tmp_path / "step_000007")


def test_tensors_are_stored_under_one_name_in_every_layout():
    """Local layer names of the norms are those of Transformer Engine, so that a GPU can load what a CPU wrote."""
    measured(2)
    paths = [checkpoint.latest(oracle_folder() / "checkpoints" / name) for name in ("single", *layouts.RESUMED)]
    assert all(json.loads((path / "metadata.json").read_text())["sharded_backend"] == "torch_dist" for path in paths)
    from torch.distributed.checkpoint import FileSystemReader

    keys = [{key for key in FileSystemReader(path).read_metadata().state_dict_metadata if key.endswith("weight")} for path in paths]
    assert all(found == keys[0] for found in keys[1:])
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys[0]
    assert "decoder.layers.pre_mlp_layernorm.weight" in keys[0] and not any("input_layernorm" in key for key in keys[0])
