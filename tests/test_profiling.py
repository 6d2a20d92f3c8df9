import copy
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fakes import candidate, completion, make_sampler  # noqa: E402

from pivotrl import preemption  # noqa: E402
from pivotrl.config import Config, DomainConfig, ProfileConfig, RolloutConfig  # noqa: E402
from pivotrl.profiling import CountedProfile, choose, merge, of_shard, profile, shard_config, statistics, summarise  # noqa: E402
from pivotrl.records import Journal, read_jsonl, write_bytes, write_json, write_jsonl  # noqa: E402
from pivotrl.stages import open_stage  # noqa: E402
from pivotrl.types import Candidate, LocalRollout, Profile, Sample, Verdict  # noqa: E402


def rollouts(*verdicts: tuple[float, str]) -> list[LocalRollout]:
    return [
        LocalRollout(
            candidate_id="c", index=i, completion=completion("x"), text="x", verdict=Verdict(reward=reward, reason="r", status=status)
        )
        for i, (reward, status) in enumerate(verdicts)
    ]


def strict(*rewards: float) -> list[Verdict]:
    return [Verdict(reward=reward, reason="s") for reward in rewards]


def test_mean_and_population_variance_by_hand():
    got = summarise("c", rollouts((1, "ok"), (0, "ok"), (0, "ok"), (0, "ok")), strict(1, 0, 0, 0), 12)
    assert (got.mean, got.variance, got.num_dropped, got.prompt_tokens, got.excluded) == (0.25, 0.1875, 0, 12, "")
    assert [(s.reward, s.strict_reward) for s in got.samples] == [(1, 1), (0, 0), (0, 0), (0, 0)]


def test_failed_verdicts_are_dropped_not_zero():
    got = summarise("c", rollouts((1, "ok"), (0, "error"), (1, "ok"), (0, "timeout")), strict(1, 0, 1, 0), 12)
    assert (got.mean, got.variance, got.num_dropped, got.excluded) == (1.0, 0.0, 2, "")
    assert [s.status for s in got.samples] == ["ok", "error", "ok", "timeout"]


def test_one_verdict_is_no_statistic():
    got = summarise("c", rollouts((1, "ok"), (0, "error")), strict(1, 0), 12)
    assert (got.excluded, got.num_dropped, got.mean) == ("verifier_failed", 1, 0.0)


def test_choose_takes_whole_trajectories_in_the_files_order():
    candidates = [candidate(f"{t}:{turn}", turn=turn) for turn in range(3) for t in "abcdef"]
    chosen = choose(candidates, 6, 0)
    assert chosen == [c for c in candidates if c in chosen] == choose(candidates, 6, 0)
    assert len(chosen) == 6 and len({c.trajectory_id for c in chosen}) == 2
    assert len({tuple(c.id for c in choose(candidates, 6, seed)) for seed in range(5)}) > 1
    assert [c.turn for c in choose(candidates, 4, 0)].count(0) == 2, "a part of a trajectory is its beginning"
    assert set(c.id for c in choose(candidates, 4, 0)) <= set(c.id for c in chosen), "a larger limit only adds"
    assert choose(candidates, None, 0) == choose(candidates, 99, 0) == candidates


@pytest.fixture
def config(tmp_path) -> Config:
    names = [f"{t}:{turn}" for t in "abc" for turn in range(2)]
    candidates = [candidate(name, history=f"question {name}") for name in names] + [candidate("d:0", history="long " * 200)]
    write_jsonl(tmp_path / "candidates" / "candidates.jsonl", candidates)
    return Config(
        candidates_path=str(tmp_path / "candidates"),
        profiles_path=str(tmp_path / "profiles"),
        domain=DomainConfig(name="toy"),
        rollout=RolloutConfig(max_prompt_tokens=100),
        profile=ProfileConfig(num_samples=4),
    )


def answer(request):
    """Depends on the request alone, as an engine's does."""
    return [completion("right" if (request.seed >> k) % 2 else "wrong") for k in range(request.n)]


def run(config: Config, *, answer=answer):
    sampler, client = make_sampler(Path(config.candidates_path), answer, config.rollout)
    return profile(config, sampler), client, (Path(config.profiles_path) / "profiles.jsonl").read_bytes()


def test_stage_profiles_every_candidate_once_in_order(config):
    counts, client, _ = run(config)
    profiles = read_jsonl(Path(config.profiles_path) / "profiles.jsonl", Profile)
    assert [p.candidate_id for p in profiles] == [f"{t}:{turn}" for t in "abc" for turn in range(2)] + ["d:0"]
    assert profiles[-1].excluded == "over_long" and profiles[-1].prompt_tokens > 100
    assert len(client.requests) == 6 and all(len(p.samples) == 4 for p in profiles[:-1])
    for p, request in zip(profiles, client.requests[::-1], strict=False):
        assert p.mean == sum((request.seed >> k) % 2 for k in range(4)) / 4 and p.prompt_tokens == len(request.prompt)
    assert counts == statistics(profiles) and (counts["profiled"], counts["excluded"], counts["samples"]) == (6, 1, 24)
    assert len(list(Path(config.profiles_path).iterdir())) == 1, "the journal goes when the file is whole"


def test_a_killed_stage_goes_on_and_ends_with_the_same_file(config):
    *_, undisturbed = run(config)
    path = Path(config.profiles_path) / "profiles.jsonl"
    finished = read_jsonl(path, CountedProfile)
    path.unlink()
    with Journal(path.with_name("profiles.journal.jsonl"), CountedProfile) as journal:
        for done in (finished[6], finished[4], finished[1]):
            journal.append(done)
    with open(journal.path, "ab") as file:
        file.write(b'{"candidate_id":"a:0","mea')
    _, client, resumed = run(config)
    assert resumed == undisturbed and len(client.requests) == 4


def test_no_candidates_is_an_error_that_says_what_to_do(config):
    write_jsonl(Path(config.candidates_path) / "candidates.jsonl", [])
    with pytest.raises(ValueError, match=r"holds no candidates; run recipes/extract_candidates.py"):
        run(config)


def test_statistics_by_hand():
    def of(*samples: tuple[float, float]) -> Profile:
        rewards = [reward for reward, _ in samples]
        variance = sum((r - sum(rewards) / len(rewards)) ** 2 for r in rewards) / len(rewards)
        return Profile(
            candidate_id="c",
            samples=tuple(Sample(text="", reward=r, reason="", strict_reward=s) for r, s in samples),
            variance=variance,
            num_dropped=1,
        )

    got = statistics([of((1, 1), (1, 0)), of((0, 0), (1, 0)), Profile(candidate_id="x", excluded="over_long")])
    assert got == {
        "profiled": 2,
        "excluded": 1,
        "samples": 4,
        "dropped_samples": 2,
        "dead_turn_share": 0.5,
        "mean_reward": 0.75,
        "strict_vs_functional_disagreement": 0.5,
        "accepted_but_not_strict_share": pytest.approx(2 / 3),
    }
    assert all(value == 0 for value in statistics([]).values())


def test_asked_to_leave_it_keeps_what_is_profiled_and_goes_on_there(config, tmp_path, monkeypatch):
    def run(answer):
        sampler, client = make_sampler(tmp_path / "candidates", answer, config.rollout)
        return sampler, client

    received: list[int] = []
    monkeypatch.setattr(preemption, "_received", received)
    sampler, client = run(lambda request: (len(client.requests) == 2 and received.append(10), [completion("right")] * 2)[1])
    with pytest.raises(preemption.Preempted, match="3 of 7 candidates are profiled"):  # two sampled, one over-long
        profile(config, sampler)
    received.clear()
    sampler, again = run(lambda request: [completion("right")] * 2)
    assert profile(config, sampler)["profiled"] == 6 and len(again.requests) == 4


def sharded(config: Config, count: int) -> Config:
    config = copy.deepcopy(config)
    config.profile.num_shards = count
    config.run_dir = str(Path(config.profiles_path).parent)
    write_json(Path(config.candidates_path) / "tools.json", {"": []})
    return config


def run_shard(config: Config, policy: Path, shard: int) -> None:
    part = shard_config(config, policy, shard)
    with open_stage("profile_candidates", part) as stage:
        counts, *_ = run(part)
        stage.count(**counts, rollout_tokens=100, busy_s=1.5)


def test_shards_join_to_the_bytes_of_one_run(config, tmp_path):
    *_, whole = run(config)
    (Path(config.profiles_path) / "profiles.jsonl").unlink()
    write_bytes(tmp_path / "policy" / "config.json", b"{}")
    config, policy = sharded(config, 3), tmp_path / "policy"
    config.model.hf_path = str(policy)
    parts = [of_shard(read_jsonl(Path(config.candidates_path) / "candidates.jsonl", Candidate), i, 3) for i in range(3)]
    assert sorted(c.id for part in parts for c in part) == ["a:0", "a:1", "b:0", "b:1", "c:0", "c:1", "d:0"]
    assert all(len({shard for shard, part in enumerate(parts) if any(c.trajectory_id == t for c in part)}) == 1 for t in "abcd")
    run_shard(config, policy, 2)
    with open_stage("profile_candidates", config), pytest.raises(ValueError, match=r"shards 0 \(not started\), 1 \(not started\) of 3"):
        merge(config, policy)
    run_shard(config, policy, 0)
    run_shard(config, policy, 1)
    with open_stage("profile_candidates", config) as stage:
        counts = merge(config, policy)
        stage.count(**counts)
    assert (Path(config.profiles_path) / "profiles.jsonl").read_bytes() == whole
    assert (counts["rollout_tokens"], counts["busy_s"], counts["profiled"], counts["excluded"]) == (300, 4.5, 6, 1)
    assert open_stage("profile_candidates", config).done


def test_a_shard_of_other_settings_is_not_joined(config, tmp_path):
    write_bytes(tmp_path / "policy" / "config.json", b"{}")
    config, policy = sharded(config, 2), tmp_path / "policy"
    config.model.hf_path = str(policy)
    run_shard(config, policy, 0)
    config.profile.num_samples = 5
    run_shard(config, policy, 1)
    with open_stage("profile_candidates", config), pytest.raises(ValueError, match=r"shards 0 \(made from other settings or inputs\) of 2"):
        merge(config, policy)
    assert not (Path(config.profiles_path) / "profiles.jsonl").exists()


def test_a_shard_that_does_not_exist_is_refused(config, tmp_path):
    for shard, count in ((3, 3), (-1, 3), (1, 1)):
        with pytest.raises(ValueError, match=f"profile.shard={shard} must lie in 0 to profile.num_shards - 1 = {count - 1}"):
            shard_config(sharded(config, count), tmp_path, shard)
    assert shard_config(config, tmp_path, 0) is config, "the only shard is the run itself"
