"""When weights go to the engines, what proves them, and what other processes do meanwhile. The loop around it: test_grpo.py."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from fakes import make_sampler  # noqa: E402

from pivotrl import engines, preemption  # noqa: E402
from pivotrl.config import AlgorithmConfig, Config  # noqa: E402
from pivotrl.engines import PROBE_TOKENS, Engines  # noqa: E402
from pivotrl.weight_sync import SyncReport  # noqa: E402


class Policy:
    """Scores every token the same."""

    logprob = -0.5

    def score(self, rows):
        return [torch.full((len(row) - 1,), self.logprob) for row in rows]

    def hf_weights(self):
        return iter(())


class Source:
    def __init__(self, sampler):
        self.sampler = sampler
        sampler.client.service = type("Service", (), {"urls": ["one", "two", "three"]})()
        sampler.client.score = lambda rows: [[-0.5] * (len(row) - 1) for row in rows]

    def probes(self, count):
        return [list(range(300 + i)) for i in range(count)]

    def sample(self, step):
        return [step]

    def versions(self, groups):
        return []


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Engines with max_staleness=1 on the main process, and the names of the phases and pushes in order."""
    notes: list = []

    def push(weights, service, *, version):
        notes.append(version)
        return SyncReport(version, 1, 1, 0.1, "", verified=version != 13)

    monkeypatch.setattr(engines.parallel, "broadcast", lambda value: value)
    monkeypatch.setattr(engines.weight_sync, "push", push)
    sampler, _ = make_sampler(tmp_path, lambda request: [])
    config = Config(run_dir=str(tmp_path), algorithm=AlgorithmConfig(max_staleness=1))
    found = Engines(config, Policy(), Source(sampler), lambda name: notes.append(name) or nullcontext())
    return found, notes


def test_new_weights_are_pushed_and_proven_on_one_short_probe_a_server(made):
    found, notes = made
    with found.sampling(0, lambda *_: None) as ahead:
        stats = found.refresh(1, 1, now=False)
        assert notes == ["rollout", "weight_sync", 1, "engine_check"] and ahead.served == (1, 1) and found.version == 1
        assert stats == {"weight_syncs": 1, "engine_gap": 0.0, "engine_gap_max": 0.0}
        found.policy.logprob = -0.6
        with pytest.raises(RuntimeError, match=f"over {3 * (PROBE_TOKENS - 1)} tokens"):
            found.refresh(2, 2, now=False)


def test_rollouts_of_the_present_policy_prove_the_push_themselves(made):
    found, notes = made
    found.config.algorithm.max_staleness = 0
    with found.sampling(0, lambda *_: None) as ahead:
        assert found.refresh(1, 1, now=False) == {"weight_syncs": 1} and ahead.served == (1, 1)
        assert notes == ["rollout", "weight_sync", 1]


def test_engines_that_are_up_to_date_get_nothing(made):
    found, notes = made
    with found.sampling(0, lambda *_: None) as ahead:
        assert found.refresh(1, 0, now=False) == {} and notes == [] and ahead.served == (1, 0)


def test_engines_that_are_busy_keep_their_weights(made, monkeypatch):
    found, notes = made
    with found.sampling(0, lambda *_: None) as ahead:
        monkeypatch.setattr(ahead, "rest", lambda step, *, now: now)
        assert found.refresh(1, 1, now=False) == {} and notes == ["rollout"]
        assert ahead.served == (0, 0) and found.version == 0, "the next refresh sends what this one did not"
        assert found.refresh(2, 2, now=True)["weight_syncs"] == 1 and ahead.served == (2, 2) and notes[1:3] == ["rollout", "weight_sync"]


def test_all_processes_follow_the_main_one(made, monkeypatch):
    """Reading the weights is collective: whether to push is for the main process to say."""
    found, notes = made
    found.source, told = None, []
    monkeypatch.setattr(engines.parallel, "broadcast", lambda value: told.append(value) or False)
    with found.sampling(0, lambda *_: None):
        assert found.refresh(1, 1, now=False) == {} and notes == ["rollout"] and told == [True]


def test_a_server_that_does_not_take_the_version_stops_the_run(made):
    with pytest.raises(RuntimeError, match="weight sync 13: a rollout server does not report"):
        made[0].push(13)


def test_asked_to_leave_during_a_check_it_is_left_out(made, monkeypatch):
    found, _ = made

    def leave(rows):
        raise preemption.Preempted("")

    found.source.sampler.client.score = leave
    assert found.check() == {}
