"""Selection: which profiled candidates are pivots, and a table of where all the others went."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pivotrl.config import Config, ProfileConfig, SelectionRule
from pivotrl.records import read_jsonl, write_jsonl
from pivotrl.types import Candidate, Pivot, Profile

FATES = ("kept", "all_zero", "all_one", "too_easy", "over_long", "verifier_failed")


def fate(profile: Profile, rule: SelectionRule, max_mean: float) -> str:
    """What becomes of one candidate: "kept" or the reason why not.

    mixed (the paper): variance > 0 and mean < max_mean. keep_all_zero also keeps turns that never succeeded.
    """
    if profile.excluded:
        return profile.excluded
    if profile.variance > 0:
        return "kept" if profile.mean < max_mean else "too_easy"
    if profile.mean > 0:
        return "all_one"
    return "kept" if rule == SelectionRule.keep_all_zero else "all_zero"


def select(profiles: Sequence[Profile], rule: SelectionRule, *, max_mean: float, seed: int) -> tuple[list[Profile], Counter[str]]:
    """The kept profiles in their order, and the count of every fate.

    random is the control: as many as `mixed` keeps, drawn uniformly from all profiles that have statistics.
    """
    fates = [fate(profile, rule, max_mean) for profile in profiles]
    kept = [profile for profile, name in zip(profiles, fates, strict=True) if name == "kept"]
    if rule == SelectionRule.random:
        eligible = [index for index, profile in enumerate(profiles) if not profile.excluded]
        drawn = set(random.Random(seed).sample(eligible, len(kept)))
        kept = [profile for index, profile in enumerate(profiles) if index in drawn]
    return kept, Counter(fates)


def pivots_of(
    candidates: Sequence[Candidate], profiles: Sequence[Profile], options: ProfileConfig, *, seed: int
) -> tuple[list[Pivot], Counter[str]]:
    """The candidates that options.rule and options.max_mean keep, as pivots in the profiles' order, and the count of every fate."""
    by_id = {candidate.id: candidate for candidate in candidates}
    kept, counts = select(profiles, options.rule, max_mean=options.max_mean, seed=seed)
    pivots = [Pivot(candidate=by_id[p.candidate_id], mean=p.mean, variance=p.variance, prompt_tokens=p.prompt_tokens) for p in kept]
    return pivots, counts


def run(config: Config) -> Counter[str]:
    """Run the stage: writes pivots.jsonl and returns the count of every fate.

    Raises:
        ValueError: no pivot is left; says where the candidates went and what usually causes it.
    """
    candidates = read_jsonl(Path(config.candidates_path) / "candidates.jsonl", Candidate)
    profiles = read_jsonl(Path(config.profiles_path) / "profiles.jsonl", Profile)
    pivots, counts = pivots_of(candidates, profiles, config.profile, seed=config.seed)
    if not pivots:
        raise ValueError(
            f"no pivots among {len(profiles)} profiles ({table_line(counts)}): a policy that never succeeds needs more warm-up, "
            "one that never fails needs harder tasks, and all-zero everywhere usually means a mis-configured verifier (check tool names)"
        )
    write_jsonl(Path(config.pivots_path) / "pivots.jsonl", pivots)
    return counts


def table_line(counts: Counter[str]) -> str:
    """`kept 120 (12.0 %), all-zero 30 (3.0 %), ...`"""
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name.replace('_', '-')} {counts[name]} ({100 * counts[name] / total:.1f} %)" for name in FATES)
