"""What the run folders of a comparison say: success, unrelated skills, costs and curves, one record for each cell and seed.

Costs: a rollout turn is one sampled action of the policy, whether kept or dropped; profiling counts in full for every cell that uses the
profile, even where several share it. Seconds are those of profile_candidates and of the training stage, without held-out evaluation
during training and without the start of Python and of the rollout server, which stays up for many runs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pivotrl import metrics
from pivotrl.paper.cells import CELLS, Cell, Folders
from pivotrl.records import read_jsonl
from pivotrl.run_folder import RunFolder
from pivotrl.types import Episode

PHASES = ("rollout_s", "logprobs_s", "update_s", "weight_sync_s", "checkpoint_s")  # of a training step, evaluation left out
Row = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What a policy took to make: sampled actions, tokens in them, seconds."""

    turns: float = 0.0
    tokens: float = 0.0
    wall_s: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.turns + other.turns, self.tokens + other.tokens, self.wall_s + other.wall_s)


@dataclass(frozen=True)
class Point:
    """Held-out task success at a cost so far; step 0 is pi_0."""

    step: int
    cost: Cost
    success: float


@dataclass(frozen=True)
class Result:
    """One cell with one seed.

    Attributes:
        tasks: 1.0 or 0.0 by held-out task.
        evaluation: result.json of the last evaluation.
        greedy: the same policy evaluated without sampling (no costs); None while it is not.
        profiling, training: what each took; profiling during training counts as profiling's turns and tokens, and training's seconds.
        curve: success against cost from pi_0 on; empty without evaluations during training.
        deviations: mean deviation of rewards inside groups by step.
    """

    name: str
    seed: int
    tasks: dict[str, float]
    evaluation: Row
    profiling: Cost = Cost()
    training: Cost = Cost()
    curve: tuple[Point, ...] = ()
    deviations: tuple[float, ...] = ()
    counts: Row = field(default_factory=dict)
    greedy: "Result | None" = None

    @property
    def success(self) -> float:
        return self.evaluation["task_success"]

    @property
    def skills(self) -> dict[str, float]:
        return self.evaluation["skills"]

    @property
    def cost(self) -> Cost:
        return self.profiling + self.training


def read_all(root: Path, seeds: Sequence[int]) -> dict[str, dict[int, Result]]:
    """Every finished cell by name and seed, in the table's order; cells that are not finished are left out."""
    folders, found = Folders(root), {}
    for cell in CELLS:
        results = {seed: read_cell(folders, cell, seed) for seed in seeds}
        finished = {seed: result for seed, result in results.items() if result is not None}
        if finished:
            found[cell.name] = finished
    return found


def read_cell(folders: Folders, cell: Cell, seed: int) -> Result | None:
    """One cell with one seed; None while it is not evaluated.

    Raises:
        ValueError: a file is damaged.
    """
    run_dir = folders.cell(cell.name, seed)
    manifest = RunFolder(run_dir).manifest()
    if manifest.get("evaluate", {}).get("status") != "done":
        return None
    tasks, evaluation = _evaluated(run_dir)
    rows = metrics.read(run_dir, cell.train) if cell.train else []
    profiling, profile = _profiling(folders, cell, seed)
    again = Cost(_sum(rows, "profiling_turns"), _sum(rows, "profiling_tokens"))
    seconds = _training_seconds(manifest, cell, rows)
    start_s = max(0.0, seconds - sum(_sum(rows, phase) for phase in PHASES))
    training = Cost(_sum(rows, "rollout_turns"), _sum(rows, "rollout_tokens"), seconds)
    return Result(
        name=cell.name,
        seed=seed,
        tasks=tasks,
        evaluation=evaluation,
        profiling=profiling + again,
        training=training,
        curve=_curve(run_dir, cell, profiling + Cost(wall_s=start_s), rows),
        deviations=tuple(row["reward_std"] for row in rows if row.get("reward_std") is not None),
        counts={
            "pivots": _pivots(run_dir),
            "dead_turn_share": profile.get("dead_turn_share"),
            "refreshes": sum("refreshed_pivots" in row for row in rows),
            "steps": len(rows),
        },
        greedy=_greedy(folders.greedy(cell.name, seed), cell, seed),
    )


def _greedy(run_dir: Path, cell: Cell, seed: int) -> Result | None:
    if RunFolder(run_dir).manifest().get("evaluate", {}).get("status") != "done":
        return None
    tasks, evaluation = _evaluated(run_dir)
    return Result(cell.name, seed, tasks, evaluation)


def _evaluated(run_dir: Path) -> tuple[dict[str, float], Row]:
    labels = [path.parent for path in run_dir.glob("evaluation/*/result.json") if not path.parent.name.startswith("step_")]
    if len(labels) != 1:
        raise ValueError(f"{run_dir / 'evaluation'} should hold one final evaluation, but has {len(labels)}: run that cell anew")
    episodes = read_jsonl(labels[0] / "episodes.jsonl", Episode)
    return {episode.task_id: float(episode.reward == 1.0) for episode in episodes}, json.loads((labels[0] / "result.json").read_bytes())


def _profiling(folders: Folders, cell: Cell, seed: int) -> tuple[Cost, Row]:
    """The whole price of the profile that a cell uses, and what it counted."""
    if cell.profile is None:
        return Cost(), {}
    entry = RunFolder(folders.profile(cell.profile, seed)).manifest()["profile_candidates"]
    counts = entry["counts"]
    return Cost(counts["samples"] + counts["dropped_samples"], counts["rollout_tokens"], entry["seconds"]), counts


def _training_seconds(manifest: Row, cell: Cell, rows: Sequence[Row]) -> float:
    return manifest[cell.train]["seconds"] - _sum(rows, "evaluation_s") if cell.train else 0.0


def _curve(run_dir: Path, cell: Cell, before: Cost, rows: Sequence[Row]) -> tuple[Point, ...]:
    """Points at the evaluations during training, behind everything that was paid until then; the first is pi_0's, if it is there."""
    if not cell.train:
        return ()
    measured = {event["step"]: event["task_success"] for event in metrics.events(run_dir, cell.train, "evaluation")}
    points, cost = [], before
    for row in rows:
        turns, tokens = (row.get(f"rollout_{unit}", 0) + row.get(f"profiling_{unit}", 0) for unit in ("turns", "tokens"))
        cost += Cost(turns, tokens, sum(row.get(phase) or 0.0 for phase in PHASES))
        if row["step"] in measured:
            points.append(Point(row["step"] + 1, cost, measured[row["step"]]))
    if not points:
        return ()
    base = _success_of_base(run_dir.parent)
    return (*([Point(0, before, base)] if base is not None else []), *points)


def _success_of_base(seed_dir: Path) -> float | None:
    return _evaluated(seed_dir / "base")[1]["task_success"] if list(seed_dir.glob("base/evaluation/*/result.json")) else None


def _pivots(run_dir: Path) -> int | None:
    path = run_dir / "pivots" / "pivots.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else None


def _sum(rows: Sequence[Row], name: str) -> float:
    return sum(row.get(name) or 0 for row in rows)
