"""Profiling: K local rollouts per candidate from the frozen policy give its reward mean and variance."""

from pathlib import Path

from pivotrl.advantage import moments
from pivotrl.config import Config
from pivotrl.local_rollouts import Sampler, seed_of
from pivotrl.metrics import progress
from pivotrl.records import Journal, read_jsonl, write_jsonl
from pivotrl.types import Candidate, LocalRollout, Profile, Sample, Verdict
from pivotrl.verifiers.strict import StrictVerifier


def choose(candidates: list[Candidate], limit: int | None, seed: int) -> list[Candidate]:
    """At most `limit` candidates, drawn by trajectory so that histories share prefixes, in the file's order."""
    if limit is None or len(candidates) <= limit:
        return candidates
    order = sorted({c.trajectory_id for c in candidates}, key=lambda trajectory: seed_of(seed, trajectory))
    rank = {trajectory: i for i, trajectory in enumerate(order)}
    chosen = {c.id for c in sorted(candidates, key=lambda c: (rank[c.trajectory_id], c.turn))[:limit]}
    return [c for c in candidates if c.id in chosen]


def summarise(candidate_id: str, rollouts: list[LocalRollout], strict: list[Verdict], prompt_tokens: int) -> Profile:
    """Population mean and variance over the samples that a verifier could judge; the others are dropped and counted."""
    samples = tuple(
        Sample(text=r.text, reward=r.verdict.reward, reason=r.verdict.reason, status=r.verdict.status, strict_reward=s.reward)
        for r, s in zip(rollouts, strict, strict=True)
    )
    rewards = [sample.reward for sample in samples if sample.status == "ok"]
    dropped = len(samples) - len(rewards)
    if len(rewards) < 2:
        return Profile(
            candidate_id=candidate_id, samples=samples, num_dropped=dropped, prompt_tokens=prompt_tokens, excluded="verifier_failed"
        )
    mean, variance = moments(rewards)
    return Profile(
        candidate_id=candidate_id, samples=samples, mean=mean, variance=variance, num_dropped=dropped, prompt_tokens=prompt_tokens
    )


def profile(config: Config, sampler: Sampler) -> dict[str, float]:
    """Run the stage: writes profiles.jsonl in the candidates' order; resumes behind the last finished candidate.

    Raises:
        ValueError: there are no candidates.
    """
    source = Path(config.candidates_path) / "candidates.jsonl"
    candidates = choose(read_jsonl(source, Candidate), config.profile.max_candidates, config.seed)
    if not candidates:
        raise ValueError(f"{source} holds no candidates; run recipes/extract_candidates.py and read its rejects.jsonl")
    strict = StrictVerifier(config.domain)
    folder = Path(config.profiles_path)
    with Journal(folder / "profiles.journal.jsonl", Profile) as journal:
        done = {record.candidate_id for record in journal.records}
        todo: list[Candidate] = []
        prompts: list[tuple[int, ...]] = []
        for candidate in candidates:
            if candidate.id in done:
                continue
            prompt = sampler.prompt(candidate)
            if len(prompt) > config.rollout.max_prompt_tokens:
                journal.append(Profile(candidate_id=candidate.id, prompt_tokens=len(prompt), excluded="over_long"))
            else:
                todo.append(candidate)
                prompts.append(prompt)
        results = sampler.collect(todo, prompts, num_samples=config.profile.num_samples, seed=config.seed)
        for index, rollouts, actions in progress(results, total=len(todo), desc="profiling"):
            verdicts = strict.verify(todo[index], actions)
            journal.append(summarise(todo[index].id, rollouts, verdicts, len(prompts[index])))
        by_id = {record.candidate_id: record for record in journal.records}
    profiles = [by_id[candidate.id] for candidate in candidates]
    write_jsonl(folder / "profiles.jsonl", profiles)
    journal.path.unlink()
    return statistics(profiles)


def statistics(profiles: list[Profile]) -> dict[str, float]:
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
