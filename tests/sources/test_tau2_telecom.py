"""The telecom expert: it passes, its trajectories are whole, repeatable, and say only what a policy can see."""

from dataclasses import replace

import pytest

from pivotrl.config import DomainConfig
from pivotrl.environments.tau2_telecom import DONE, TRANSFER, TelecomEnvironment
from pivotrl.sources import build_source
from pivotrl.sources import tau2_telecom as source_module
from pivotrl.types import Action, Reject, Trajectory

DOMAIN = DomainConfig(
    name="tau2_telecom", source="tau2_telecom", verifier="state_equality", environment="tau2_telecom", system_prompt=False
)


def calls_of(trajectory: Trajectory) -> list[str]:
    return [message.tool_calls[0].name for message in trajectory.messages if message.role == "assistant"]


def test_refs_are_all_tasks_with_the_benchmark_test_split_held_out():
    refs = build_source(DOMAIN).refs()
    assert len(refs) == len({ref.key for ref in refs}) == 2285
    assert all(ref.key == ref.task_id for ref in refs)
    assert sum(ref.split == "heldout" for ref in refs) == 40
    assert refs == build_source(DOMAIN).refs()


def test_expert_passes_and_its_trajectories_replay():
    source = build_source(DOMAIN)
    refs = source.refs()
    service = [ref for ref in refs if ref.key.startswith("[service_issue]")]
    for ref in [*refs[::40], *service[::3]]:
        trajectory = source.read(ref.key)
        assert isinstance(trajectory, Trajectory), trajectory
        assert (trajectory.split, trajectory.reward) == (ref.split, 1.0)
        environment = TelecomEnvironment(DOMAIN, trajectory.state)
        replayed, ended = list(environment.reset()), False
        for message in trajectory.messages:
            if message.role == "assistant":
                assert not ended and message.content == "" and len(message.tool_calls) == 1
                answers, ended = environment.step(Action.from_message(message))
                replayed += [message, *answers]
        assert ended and environment.reward() == 1.0
        assert tuple(replayed) == trajectory.messages
        assert calls_of(trajectory)[-1] in (DONE, TRANSFER)
        ids = [message.tool_calls[0].id for message in trajectory.messages if message.role == "assistant"]
        assert ids == [f"call_{turn}" for turn in range(len(ids))]


def test_expert_does_nothing_in_vain():
    """Every repair changes the state; otherwise the verifier would take it for a look-up."""
    source = build_source(DOMAIN)
    for ref in source.refs()[::100]:
        trajectory = source.read(ref.key)
        environment = TelecomEnvironment(DOMAIN, trajectory.state)
        for message in trajectory.messages:
            if message.role == "assistant":
                before, name = environment.state_hash(), message.tool_calls[0].name
                environment.step(Action.from_message(message))
                looks = name.startswith(("check_", "get_", "can_", "run_")) or name in (DONE, TRANSFER)
                assert looks == (environment.state_hash() == before), (ref.key, name)


def test_hopeless_tasks_are_handed_over():
    source = build_source(DOMAIN)
    keys = [ref.key for ref in source.refs() if "lock_sim" in ref.key or "contract_end" in ref.key]
    assert len(keys) == 32
    for key in keys[::8]:
        assert calls_of(source.read(key))[-1] == TRANSFER


def test_reading_is_repeatable():
    source = build_source(DOMAIN)
    key = source.refs()[7].key
    assert source.read(key) == source.read(key)


def test_a_failed_episode_is_a_reject(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_module, "CHECKS", {})  # identifies the customer, looks around, repairs little
    source = build_source(DOMAIN)
    key = next(ref.key for ref in source.refs() if ref.key.startswith("[mms_issue]bad_wifi_calling"))
    reject = source.read(key)
    assert isinstance(reject, Reject)
    assert (reject.where, reject.reason) == (key, "episode_failed")


def test_unknown_key_is_refused():
    with pytest.raises(ValueError, match="'task_id' must be one of"):
        build_source(DOMAIN).read("nope")


def test_a_careless_warm_up_sees_faults_and_leaves_some():
    """Look-ups stay, repairs are left out in about the share asked for, always the same ones."""
    careful, careless = build_source(DOMAIN), build_source(replace(DOMAIN, warmup_overlooked=0.5))
    keys = [ref.key for ref in careful.refs()[::40]]
    repairs = [0, 0]
    rewards = []
    for key in keys:
        expert, made = careful.read(key), careless.read_warmup(key)
        assert made == careless.read_warmup(key)
        assert calls_of(made)[-1] == DONE or made == expert
        repairs[0] += sum(source_module.is_repair(name) for name in calls_of(expert))
        repairs[1] += sum(source_module.is_repair(name) for name in calls_of(made))
        rewards.append(made.reward)
    assert 0.35 < repairs[1] / repairs[0] < 0.65
    assert 0 < sum(rewards) < 0.3 * len(keys), "one overlooked repair is enough to fail"
    assert careless.read(keys[0]) == careful.read(keys[0]), "only the warm-up is careless"
