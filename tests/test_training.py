"""What training recipes set up. That real processes, servers and checkpoints come of it is tested in tests/recipes."""

from contextlib import contextmanager

import pytest

from pivotrl import training
from pivotrl.config import Config, RolloutConfig


class NotedPolicy:
    """Remembers what was asked of it, in order."""

    def __init__(self, config, optimizer, *, num_steps):
        self.events: list[object] = [num_steps]

    def load_hf(self, path) -> None:
        self.events.append(("load", str(path)))

    def snapshot_reference(self) -> None:
        self.events.append("snapshot")


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(run_dir=str(tmp_path / "run"))


@pytest.fixture
def alone(monkeypatch) -> list[str]:
    """No servers, no Megatron; the folders that checkpoints were looked for in, and whether the sampler is open."""
    noted: list[str] = []

    @contextmanager
    def open_sampler(config, policy):
        noted.append("opened")
        yield "sampler"
        noted.append("closed")

    monkeypatch.setattr(training, "open_sampler", open_sampler)
    monkeypatch.setattr(training, "Policy", NotedPolicy)
    monkeypatch.setattr(training.parallel, "rank", lambda: 0)
    monkeypatch.setattr(training.parallel, "is_main", lambda: True)
    monkeypatch.setattr(training.checkpoint, "start_from", lambda policy, options: policy.events.append("start_from"))
    monkeypatch.setattr(training.checkpoint, "resume", lambda policy, folder: noted.append(folder.as_posix()) or (5, 4))
    return noted


def test_bad_settings_are_refused_before_any_process_is_joined(config, monkeypatch):
    monkeypatch.setattr(training.parallel, "start", lambda *_: pytest.fail("joined"))
    config.rollout = RolloutConfig(top_p=0.5)
    with pytest.raises(ValueError, match="rollout.top_p=0.5"):
        training.start(config)


def test_the_main_process_samples_and_logs(config, alone, tmp_path):
    config.algorithm.num_steps = 9
    with training.prepared("train_x", config) as run:
        assert (run.sampler, run.start, run.version, run.log.stage) == ("sampler", 5, 4, "train_x")
        assert run.policy.events == [9, ("load", f"{tmp_path}/run/hf/sft"), "start_from"]
    assert alone == ["opened", f"{tmp_path}/run/checkpoints/grpo", "closed"]


def test_other_processes_have_the_policy_alone(config, alone, monkeypatch):
    monkeypatch.setattr(training.parallel, "is_main", lambda: False)
    config.algorithm.kl_beta = 0.1
    with training.prepared("train_x", config) as run:
        assert (run.sampler, run.log, run.policy.events[-1]) == (None, None, "snapshot"), "pi_0 before a checkpoint is loaded over it"
    assert "opened" not in alone
