"""A comparison as numbers: summary.json with every cell, seed and cost. What is not there is null, never a guess."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pivotrl.paper import claims, published
from pivotrl.paper.cells import CELLS, Cell, Folders
from pivotrl.paper.results import Result, read_all
from pivotrl.paper.statistics import deviation, equal_success, greedy, mean, mean_curve, skill_change, skill_changes, success_difference
from pivotrl.recipe import compose, to_dict
from pivotrl.run_folder import RunFolder

SIZES = {  # what a reader must know to judge the scale, by group of the configuration
    "model": ("name", "hidden_size", "num_layers", "num_experts", "experts_per_token", "vocab_size"),
    "domain": ("name", "verifier", "num_heldout_tasks", "num_warmup_tasks", "num_train_tasks", "warmup_overlooked"),
    "sft": ("num_steps", "tokens_per_step", "skill_share", "optimizer.lr", "optimizer.min_lr"),
    "profile": ("num_samples", "max_candidates", "max_mean", "rule"),
    "algorithm": ("num_steps", "pivots_per_step", "group_size"),
    "optimizer": ("lr", "min_lr"),
    "e2e": ("tasks_per_step", "max_turns"),
    "evaluation": ("max_tasks", "max_turns", "skill_examples", "every_steps", "temperature"),
}
Results = dict[str, dict[int, Result]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A comparison that has been read; `missing` are the cells with the seeds that were asked for and are not finished."""

    root: Path
    experiment: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    results: Results
    missing: dict[str, list[int]]


def read(root: Path) -> Outcome:
    """Read a folder of the runner, whole or in part.

    Raises:
        ValueError: it is no such folder, or nothing in it is finished.
    """
    path = root / "paper.json"
    if not path.exists():
        raise ValueError(f"{root} holds no comparison (no paper.json); run tools/paper.py --folder {root} without --report-only first")
    described = json.loads(path.read_bytes())
    asked = {cell.name: described["cells"][cell.name] for cell in CELLS if cell.name in described["cells"]}
    seeds = tuple(sorted({seed for wanted in asked.values() for seed in wanted}))
    results = read_all(root, seeds)
    if not results:
        raise ValueError(f"no cell in {root} is finished yet; run tools/paper.py --folder {root}")
    missing = {name: [seed for seed in wanted if seed not in results.get(name, {})] for name, wanted in asked.items()}
    missing = {name: absent for name, absent in missing.items() if absent}
    return Outcome(root, described["experiment"], seeds, tuple(described["overrides"]), results, missing)


def summarise(outcome: Outcome) -> dict[str, Any]:
    """summary.json. Shares lie in 0..1; rollout turns and tokens include profiling's; seconds leave evaluation and starts out.

    A cell's costs are means over seeds; `per_seed` has them one by one, in the order of `seeds`.
    """
    results, seeds = outcome.results, outcome.seeds
    dates, commits = _made(outcome)
    others = [name for name in results if name != "pivotrl" and "pivotrl" in results]
    differences = {f"pivotrl - {name}": _difference(success_difference(results["pivotrl"], results[name])) for name in others}
    greedily = {f"pivotrl - {name}": _difference(success_difference(greedy(results["pivotrl"]), greedy(results[name]))) for name in others}
    return {
        "date": dates,
        "git": commits,
        "written": datetime.now(UTC).date().isoformat(),
        "experiment": outcome.experiment,
        "overrides": list(outcome.overrides),
        "seeds": list(seeds),
        "held_out_tasks": max(len(result.tasks) for found in results.values() for result in found.values()),
        "sizes": _sizes(outcome),
        "missing": outcome.missing,
        "methods": {name: _method(found, results.get("base", {}), seeds) for name, found in results.items()},
        "differences": differences,
        "differences_greedy": greedily,
        "rollout_turns_at_equal_success": equal_success(results.get("pivotrl", {}), results.get("e2e", {})),
        "claims": [dataclasses.asdict(claim) for claim in claims.judge(results)],
        "paper": {"model": published.MODEL, "rollout_turns": {name: quoted.value for name, quoted in published.EQUAL_TURNS.items()}},
    }


def _method(found: Mapping[int, Result], base: Mapping[int, Result], seeds: Sequence[int]) -> dict[str, Any]:
    def per_seed(value: Any) -> list[Any]:
        return [value(found[seed]) if seed in found else None for seed in seeds]

    def changes(value: Any) -> list[Any]:
        return [value(found[seed], base[seed]) if seed in found and seed in base else None for seed in seeds]

    costs = {
        "rollout_turns": per_seed(lambda r: r.cost.turns),
        "rollout_tokens": per_seed(lambda r: r.cost.tokens),
        "wall_s": per_seed(lambda r: round(r.cost.wall_s, 1)),
        "profiling_turns": per_seed(lambda r: r.profiling.turns),
        "profiling_wall_s": per_seed(lambda r: round(r.profiling.wall_s, 1)),
    }
    families = sorted({family for result in found.values() for family in result.skills})
    by_family = [change or {} for change in changes(skill_changes)]
    out_of_domain = changes(lambda result, start: mean(list(skill_changes(result, start).values())))
    return {
        "task_success": per_seed(lambda r: r.success),
        "task_success_mean": spread(per_seed(lambda r: r.success)),
        "task_success_change": changes(lambda result, start: result.success - start.success),
        "task_success_change_mean": _difference(success_difference(found, base)),
        "out_of_domain_change": out_of_domain,
        "out_of_domain_change_mean": _difference(skill_change(found, base)),
        "out_of_domain": per_seed(lambda r: r.evaluation["out_of_domain"]),
        "skills": {family: per_seed(lambda r, family=family: r.skills[family]) for family in families},
        "skills_change": {family: [change.get(family) for change in by_family] for family in families},
        "greedy": _greedy(greedy(found), greedy(base), seeds),
        "pivot_reward": per_seed(lambda r: r.evaluation["pivot_reward"]),
        **{name: _mean(values) for name, values in costs.items()},
        "per_seed": costs,
        **{name: per_seed(lambda r, name=name: r.counts.get(name)) for name in ("pivots", "dead_turn_share", "refreshes", "steps")},
        "curve": [
            {"step": point.step, "task_success": point.success, "rollout_turns": point.cost.turns, "rollout_tokens": point.cost.tokens,
             "wall_s": round(point.cost.wall_s, 1)}
            for point in mean_curve(found)
        ],
    }  # fmt: skip


def _greedy(found: Mapping[int, Result], base: Mapping[int, Result], seeds: Sequence[int]) -> dict[str, Any]:
    return {
        "task_success": [found[seed].success if seed in found else None for seed in seeds],
        "out_of_domain_change_mean": _difference(skill_change(found, base)),
    }


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation over the seeds that are there."""
    present = [value for value in values if value is not None]
    return {"mean": mean(present) if present else None, "sd": deviation(present)}


def _mean(values: Sequence[float | None]) -> float | None:
    return spread(values)["mean"]


def _difference(difference: Any) -> dict[str, Any] | None:
    return None if difference is None else {"mean": difference.mean, "standard_error": difference.error}


def _sizes(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """The configured sizes by group (`sft`: of the warm-up), then what the careless half or a method changes, under `only <it>`."""
    main, found = _chosen(outcome, ""), {}
    for variant in sorted({"_careless"} | {cell.variant for cell in CELLS} - {""}):
        differing = [
            (f"{group}.{name}", value)
            for group, chosen in _chosen(outcome, variant).items()
            for name, value in chosen.items()
            if main[group][name] != value
        ]
        found[f"only {variant.removeprefix('_')}"] = dict(differing)
    return main | found


def _chosen(outcome: Outcome, variant: str) -> dict[str, dict[str, Any]]:
    plain = to_dict(compose(f"experiment={outcome.experiment}{variant}", *outcome.overrides))
    return {group: {name: _field(plain[group], name) for name in names} for group, names in SIZES.items()}


def _field(group: dict[str, Any], dotted: str) -> Any:
    for part in dotted.split("."):
        group = group[part]
    return group


def _made(outcome: Outcome) -> tuple[str, list[str]]:
    """The day on which the last evaluation ended, and the commits that the finished cells were made with."""
    entries = []
    for cell in CELLS:
        entries += [entry for seed in outcome.results.get(cell.name, {}) for entry in _entries(outcome.root, cell, seed)]
    finished = max(entry["finished"] for entry in entries)
    return finished[:10], sorted({entry["git"] for entry in entries if entry.get("git")})


def _entries(root: Path, cell: Cell, seed: int) -> list[dict[str, Any]]:
    return [entry for entry in RunFolder(Folders(root).cell(cell.name, seed)).manifest().values() if entry.get("finished")]
