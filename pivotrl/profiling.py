"""Profiling: K local rollouts per candidate from the frozen policy give its reward mean and variance.

A candidate's samples depend on the seed and the candidate alone, so shards (profile.num_shards) join to what one run would write.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

from pivotrl import preemption, watchdog
from pivotrl.advantage import moments
from pivotrl.config import Config
from pivotrl.local_rollouts import Sampler, seed_of
from pivotrl.metrics import progress
from pivotrl.records import completed, read_jsonl, write_jsonl
from pivotrl.run_folder import RunFolder
from pivotrl.types import Candidate, LocalRollout, Profile, Sample, Verdict
from pivotrl.verifiers.strict import StrictVerifier


class CountedProfile(Profile):
    """A profile with the sampled tokens that it cost; whoever does not ask for them reads it as a `Profile`."""

    num_tokens: int = 0


def choose(candidates: list[Candidate], limit: int | None, seed: int) -> list[Candidate]:
    """At most `limit` candidates, drawn by trajectory so that histories share prefixes, in the file's order."""
    if limit is None or len(candidates) <= limit:
        return candidates
    order = sorted({c.trajectory_id for c in candidates}, key=lambda trajectory: seed_of(seed, trajectory))
    rank = {trajectory: i for i, trajectory in enumerate(order)}
    chosen = {c.id for c in sorted(candidates, key=lambda c: (rank[c.trajectory_id], c.turn))[:limit]}
    return [c for c in candidates if c.id in chosen]


def shard_config(config: Config, policy: Path, shard: int) -> Config:
    """The configuration of one shard: a run folder of its own beside the profiles, so that shards share no manifest or journal.
    The only shard is the run itself.

    Raises:
        ValueError: there is no such shard.
    """
    count = config.profile.num_shards
    if not 0 <= shard < count:
        raise ValueError(f"profile.shard={shard} must lie in 0 to profile.num_shards - 1 = {count - 1}; set profile.num_shards")
    if count == 1:
        return config
    mine = copy.deepcopy(config)
    mine.profile.shard = shard
    mine.model.hf_path = str(policy)
    mine.run_dir = f"{config.profiles_path.rstrip('/')}_shards/{shard:05d}-of-{count:05d}"
    mine.profiles_path = f"{mine.run_dir}/profiles"
    return mine


def of_shard(candidates: list[Candidate], shard: int | None, num_shards: int) -> list[Candidate]:
    """A shard's part, in the file's order: every num_shards-th trajectory, since turns of one share their prefixes. None: all."""
    if shard is None:
        return candidates
    number = {trajectory: i for i, trajectory in enumerate(dict.fromkeys(c.trajectory_id for c in candidates))}
    return [c for c in candidates if number[c.trajectory_id] % num_shards == shard]


def merge(config: Config, policy: Path) -> dict[str, float]:
    """Join finished shards to the profiles.jsonl of one run; call it inside the opened stage, whose manifest entry is compared.

    Raises:
        ValueError: shards are missing, unfinished, or made from other settings or inputs; names them all.
    """
    ours = RunFolder(Path(config.run_dir)).manifest()["profile_candidates"]
    by_id: dict[str, CountedProfile] = {}
    tokens, busy_s, unusable = 0.0, 0.0, []
    for shard in range(config.profile.num_shards):
        part = shard_config(config, policy, shard)
        entry = RunFolder(Path(part.run_dir)).manifest().get("profile_candidates", {"status": "not started"})
        path = Path(part.profiles_path) / "profiles.jsonl"
        if entry["status"] != "done" or not path.exists():
            unusable.append(f"{shard} ({entry['status']})")
        elif (entry["config"], entry["inputs"]) != (ours["config"], ours["inputs"]):
            unusable.append(f"{shard} (made from other settings or inputs)")
        else:
            by_id |= {record.candidate_id: record for record in read_jsonl(path, CountedProfile)}
            tokens += entry["counts"].get("rollout_tokens", 0)
            busy_s += entry["counts"].get("busy_s", 0.0)
    if unusable:
        raise ValueError(
            f"shards {', '.join(unusable)} of {config.profile.num_shards} cannot be joined: run recipes/profile_candidates.py with "
            "profile.shard=N for each (on Slurm: sbatch --array=N,... slurm/profile.sbatch), then this command again"
        )
    candidates = read_candidates(config)
    if lacking := [c.id for c in candidates if c.id not in by_id]:
        raise ValueError(f"the shards lack {len(lacking)} of {len(candidates)} candidates, the first is {lacking[0]}; profile them anew")
    profiles = [by_id[candidate.id] for candidate in candidates]
    write_jsonl(Path(config.profiles_path) / "profiles.jsonl", profiles)
    return statistics(profiles) | {"rollout_tokens": tokens, "busy_s": busy_s}


def read_candidates(config: Config) -> list[Candidate]:
    """The candidates that profile.max_candidates leaves, in the file's order; ValueError when there are none."""
    source = Path(config.candidates_path) / "candidates.jsonl"
    candidates = choose(read_jsonl(source, Candidate), config.profile.max_candidates, config.seed)
    if not candidates:
        raise ValueError(f"{source} holds no candidates; run recipes/extract_candidates.py and read its rejects.jsonl")
    return candidates


def summarise(candidate_id: str, rollouts: list[LocalRollout], strict: list[Verdict], prompt_tokens: int) -> CountedProfile:
    """Population mean and variance over the samples that a verifier could judge; the others are dropped and counted."""
    samples = tuple(
        Sample(text=r.text, reward=r.verdict.reward, reason=r.verdict.reason, status=r.verdict.status, strict_reward=s.reward)
        for r, s in zip(rollouts, strict, strict=True)
    )
    rewards = [sample.reward for sample in samples if sample.status == "ok"]
    mean, variance = moments(rewards) if len(rewards) > 1 else (0.0, 0.0)
    return CountedProfile(
        candidate_id=candidate_id,
        samples=samples,
        mean=mean,
        variance=variance,
        num_dropped=len(samples) - len(rewards),
        prompt_tokens=prompt_tokens,
        excluded="" if len(rewards) > 1 else "verifier_failed",
        num_tokens=sum(len(r.completion.token_ids) for r in rollouts),
    )


def profile(config: Config, sampler: Sampler) -> dict[str, float]:
    """Run the stage: writes profiles.jsonl in the candidates' order.

    Raises:
        ValueError: there are no candidates.
        Preempted: as `profile_candidates`.
    """
    candidates = of_shard(read_candidates(config), config.profile.shard, config.profile.num_shards)
    strict, folder = StrictVerifier(config.domain), Path(config.profiles_path)
    profiles = profile_candidates(
        candidates, sampler, folder=folder, strict=strict, num_samples=config.profile.num_samples, seed=config.seed
    )
    return statistics(profiles)


def profile_candidates(
    candidates: Sequence[Candidate], sampler: Sampler, *, folder: Path, strict: StrictVerifier, num_samples: int, seed: int
) -> list[CountedProfile]:
    """Profile with the policy in the engines into `folder`/profiles.jsonl, or read it; resumes behind the last finished candidate.

    Raises:
        Preempted: asked to leave before all were profiled; the finished ones are in a journal.
    """

    def sample(done: set[str]) -> Iterator[CountedProfile]:
        todo: list[Candidate] = []
        prompts: list[tuple[int, ...]] = []
        for candidate in candidates:
            if candidate.id in done:
                continue
            watchdog.beat("profiling: rendering")
            prompt = sampler.prompt(candidate)
            if len(prompt) > sampler.rollout.max_prompt_tokens:
                yield CountedProfile(candidate_id=candidate.id, prompt_tokens=len(prompt), excluded="over_long")
            else:
                todo.append(candidate)
                prompts.append(prompt)
        results = sampler.collect(todo, prompts, num_samples=num_samples, seed=seed)
        for index, rollouts, actions in progress(results, total=len(todo), desc="profiling"):
            watchdog.beat("profiling: sampling")
            if preemption.requested() and any(r.verdict.status != "ok" for r in rollouts):
                continue  # the signal may have reached the verifier first
            verdicts = strict.verify(todo[index], actions)
            yield summarise(todo[index].id, rollouts, verdicts, len(prompts[index]))

    ids = [candidate.id for candidate in candidates]
    profiles = completed(folder / "profiles.jsonl", CountedProfile, ids, key=lambda record: record.candidate_id, make=sample)
    if len(profiles) < len(candidates):
        preemption.check(f"{len(profiles)} of {len(candidates)} candidates are profiled")
        raise AssertionError("the sampler gave fewer profiles than it was asked for")
    return profiles


def statistics(profiles: Sequence[Profile]) -> dict[str, float]:
    """Counts for the report: dead turns, dropped samples, and how often the strict and the functional verdict differ."""
    used = [p for p in profiles if not p.excluded]
    judged = [s for p in used for s in p.samples if s.status == "ok"]
    accepted = [s for s in judged if s.reward == 1.0]
    return {
        "profiled": len(used),
        "excluded": len(profiles) - len(used),
        "samples": len(judged),
        "dropped_samples": sum(p.num_dropped for p in profiles),
        "dead_turn_share": _share(sum(p.variance == 0 for p in used), len(used)),
        "mean_reward": _share(sum(s.reward for s in judged), len(judged)),
        "strict_vs_functional_disagreement": _share(sum((s.reward == 1.0) != (s.strict_reward == 1.0) for s in judged), len(judged)),
        "accepted_but_not_strict_share": _share(sum(s.strict_reward < 1.0 for s in accepted), len(accepted)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
