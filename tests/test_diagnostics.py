import math

import pytest

from pivotrl.diagnostics import check_gap, mean, normalised, rollout_statistics, speeds, staleness, totals
from pivotrl.types import Completion, Group, LocalRollout, Verdict


def group(*rewards: float | None, expert_calls: int = 1, num_calls: int = 1, finish: str = "stop") -> Group:
    """One rollout of two tokens per reward; None is a failed verifier."""
    rollouts = tuple(
        LocalRollout(
            candidate_id="c",
            index=i,
            completion=Completion(token_ids=(1, 2), logprobs=(0.0, 0.0), finish_reason=finish, policy_version=0),
            text="",
            verdict=Verdict(reward=reward or 0.0, reason="", status="error" if reward is None else "ok"),
            num_calls=num_calls,
        )
        for i, reward in enumerate(rewards)
    )
    return Group(candidate_id="c", trajectory_id="t", expert_calls=expert_calls, prompt=(1, 2, 3), rollouts=rollouts)


def test_statistics_by_hand():
    groups = [group(1, 0), group(1, 1, None, expert_calls=0, num_calls=3, finish="length")]
    assert rollout_statistics(groups) == {
        "reward_mean": 0.75,
        "reward_std": 0.25,  # 0.5 within the first group, 0 within the second
        "dead_group_share": 0.5,
        "dropped_samples": 1,
        "truncation_rate": 0.6,
        "calls_per_reply": pytest.approx((2 * 1 + 3 * 3) / 5),
        "completion_tokens_mean": 2,
        "rollout_turns": 5,
        "rollout_tokens": 10,
        "prompt_tokens_mean": 3,
        "reward_call_turns": 0.5,
        "calls_per_reply_call_turns": 1,
        "reward_message_turns": 1,
        "calls_per_reply_message_turns": 3,
    }


def test_turns_of_one_kind_report_no_other():
    assert "reward_message_turns" not in rollout_statistics([group(1, 0)])
    assert "reward_call_turns" not in rollout_statistics([group(1, 0, expert_calls=0)])


def test_a_group_whose_verifier_failed_is_dead_and_no_reward():
    stats = rollout_statistics([group(None, None), group(1, 0)])
    assert (stats["reward_mean"], stats["reward_std"], stats["dead_group_share"], stats["dropped_samples"]) == (0.5, 0.5, 0.5, 2)


def test_averages_are_over_the_weight_that_took_part():
    got = normalised(
        {"weight": 0.5, "entropy": 1.0, "kl": 0.25, "capped_share": 0.05, "loss": 0.3, "grad_norm": 2.0, "logprob_gap_max": 0.1}
    )
    assert got == {"entropy": 2.0, "kl": 0.5, "capped_share": 0.1, "loss": 0.3, "grad_norm": 2.0, "logprob_gap_max": 0.1}


def test_staleness_by_hand():
    expected = {"staleness_mean": 1.25, "staleness_max": 3, "staleness_count_0": 1, "staleness_count_1": 2, "staleness_count_3": 1}
    assert staleness(5, [4, 5, 2, 4]) == expected
    assert staleness(2, [2, 2]) == {"staleness_mean": 0, "staleness_max": 0, "staleness_count_0": 2}
    newer = {"staleness_mean": -1, "staleness_max": -1, "staleness_count_-1": 1}
    assert staleness(2, [3]) == newer, "left by a killed run that was further than its checkpoint"
    assert staleness(2, []) == {"staleness_mean": 0, "staleness_max": 0}


def test_speeds_count_the_sampling_that_nobody_waited_for():
    stats = {"rollout_tokens": 100, "train_tokens": 60, "sampling_s": 4.0}
    assert speeds(stats, {"rollout_s": 0.01, "update_s": 2.0}) == {"rollout_tokens_per_s": 25, "train_tokens_per_s": 30}
    assert speeds(stats, {"rollout_s": 4.0}) == {"rollout_tokens_per_s": 25}


def test_mean_of_nothing_is_zero():
    assert mean([]) == 0 and mean([1, 2]) == 1.5 and rollout_statistics([])["reward_mean"] == 0


def test_totals_of_a_run_are_sums_over_its_rows():
    rows = [{"rollout_turns": 4, "rollout_tokens": 40, "train_tokens": 30, "weight_syncs": 1}, {"rollout_turns": 4, "rollout_tokens": 50}]
    expected = {"rollout_turns": 8, "rollout_tokens": 90, "train_tokens": 30, "weight_syncs": 1, "weight_syncs_verified": 1}
    assert totals(rows) == expected | {"profiling_turns": 0, "profiling_tokens": 0}
    assert totals([{"profiling_turns": 5}, {"profiling_turns": 2, "profiling_tokens": 9}])["profiling_turns"] == 7


@pytest.mark.parametrize("gap", [2e-3, math.nan])
def test_drift_between_engine_and_trainer_stops_the_run(gap):
    check_gap({"logprob_gap": 1e-4, "weight": 0.5}, 1e-3, step=0)
    with pytest.raises(RuntimeError, match="step 3.*over rollout.max_mean_logprob_gap=1.00e-03.*weight sync"):
        check_gap({"logprob_gap": gap, "weight": 1.0}, 1e-3, step=3)
