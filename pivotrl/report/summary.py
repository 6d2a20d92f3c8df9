"""The numbers of a run, from its folder alone. What a run lacks is None, never a guess."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pivotrl import metrics
from pivotrl.profiling import statistics
from pivotrl.records import read_jsonl
from pivotrl.run_folder import RunFolder
from pivotrl.selection import table_line
from pivotrl.stages import STAGES
from pivotrl.types import Pivot, Profile

STALENESS = "staleness_count_"
MEASURES = ("pivot_reward", "task_success", "out_of_domain")
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run folder holds; parts that it lacks are empty.

    Attributes:
        manifest: the stages' entries by name.
        sft, grpo: rows of metrics.jsonl of the two training stages.
        profiles, pivots: of this run, or of the one whose profiles_path or pivots_path it uses.
        evaluations: result.json by label; "before" first, then "after", then others.
        command: the command line that made the run, "" when unknown.
    """

    path: Path
    manifest: dict[str, Row]
    sft: list[Row]
    grpo: list[Row]
    profiles: list[Profile]
    pivots: list[Pivot]
    evaluations: dict[str, Row]
    command: str = ""

    def counts(self, stage: str) -> Row:
        """What a stage counted; empty when it did not run or did not finish."""
        entry = self.manifest.get(stage, {})
        return entry.get("counts", {}) if entry.get("status") == "done" else {}


def read_run(run_dir: Path) -> Run:
    """Read a run folder, whole or in part.

    Raises:
        ValueError: it holds no manifest.json, or one of its files is damaged.
    """
    folder = RunFolder(run_dir)
    if not folder.manifest_path.exists():
        raise ValueError(f"{run_dir} is no run folder (it has no manifest.json); give the folder runs/<run_name> of a run that has started")
    config_path = run_dir / "config.yaml"
    config = yaml.safe_load(config_path.read_text()) if config_path.exists() else {}
    results = {path.parent.name: path for path in run_dir.glob("evaluation/*/result.json")}
    labels = sorted(results, key=lambda label: ({"before": 0, "after": 1}.get(label, 2), label))
    command = run_dir / "command.txt"
    profiles, pivots = (_artifact(run_dir, name, config.get(f"{name}_path")) for name in ("profiles", "pivots"))
    return Run(
        path=run_dir,
        manifest=folder.manifest(),
        sft=metrics.read(run_dir, "train_sft"),
        grpo=metrics.read(run_dir, "train_grpo"),
        profiles=read_jsonl(profiles, Profile) if profiles.exists() else [],
        pivots=read_jsonl(pivots, Pivot) if pivots.exists() else [],
        evaluations={label: json.loads(results[label].read_bytes()) for label in labels},
        command=command.read_text().strip() if command.exists() else "",
    )


def _artifact(run_dir: Path, name: str, configured: str | None) -> Path:
    """The run's own file, also when the folder was moved; else the one of another run that its config names."""
    own = run_dir / name / f"{name}.jsonl"
    return own if own.exists() or not configured else Path(configured) / f"{name}.jsonl"


def summary(run_dir: Path) -> dict[str, Any]:
    """The numbers of report/summary.json: counts, shares in 0..1, seconds, tokens per second, nats (logprob_gap), GiB.

    `staleness`: sampled actions by the number of updates that the policy was ahead of them.

    Raises:
        ValueError: see `read_run`.
    """
    return summarise(read_run(run_dir))


def summarise(run: Run) -> dict[str, Any]:
    """`summary` of a run that has been read."""
    profiled = run.counts("profile_candidates") or (statistics(run.profiles) if run.profiles else {})
    trained = run.counts("train_grpo")
    sampled = profiled["samples"] + profiled["dropped_samples"] if "samples" in profiled else None
    # Rows outlive a restart; the stage's own totals begin anew with every start.
    training = total(run.grpo, "rollout_turns")
    gaps, gap_max = _gaps(run.grpo)
    return {
        "seconds": {
            stage: _seconds(run.manifest.get(stage)) for stage in [*STAGES, *(name for name in run.manifest if name not in STAGES)]
        },
        "candidates": run.counts("extract_candidates").get("candidates"),
        "profiled": profiled.get("profiled"),
        "pivots": run.counts("select_pivots").get("kept") or len(run.pivots) or None,
        "dead_turn_share": profiled.get("dead_turn_share"),
        "strict_vs_functional_disagreement": profiled.get("strict_vs_functional_disagreement"),
        "before": measures(run.evaluations.get("before", {})),
        "after": measures(run.evaluations.get("after", {})),
        "rollout_turns": None if sampled is None and training is None else (sampled or 0) + (training or 0),
        "rollout_turns_profiling": sampled,
        "rollout_turns_training": training,
        "train_tokens_per_s": _rate(run.grpo, "train_tokens", "update_s"),
        # rollout_s is what the trainer waited: less than sampling took, where it ran beside an update
        "rollout_tokens_per_s": _rate(run.grpo, "rollout_tokens", "sampling_s" if values(run.grpo, "sampling_s") else "rollout_s"),
        "logprob_gap": {"mean": sum(gaps) / len(gaps) if gaps else None, "max": max(gap_max, default=None)},
        "staleness": {str(number): count for number, count in staleness_counts(run.grpo).items()},
        "weight_sync": {"count": trained.get("weight_syncs"), "verified": trained.get("weight_syncs_verified")},
        "peak_rss_gib": max(values([*run.sft, *run.grpo], "peak_rss_gib"), default=None),
    }


def staleness_counts(rows: Iterable[Row]) -> dict[int, int]:
    """How many sampled actions the policy was n updates ahead of, by n; empty where no row tells."""
    found: Counter[int] = Counter()
    for row in rows:
        found.update({int(name.removeprefix(STALENESS)): row[name] for name in row if name.startswith(STALENESS)})
    return dict(sorted(found.items()))


def _gaps(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Mean and largest difference of engine and trainer logprobs: of stale rollouts it would be the policy's movement, so of probes."""
    comparable = [(row, "engine_gap" if (row.get("staleness_max") or 0) > 0 else "logprob_gap") for row in rows]
    means = [row[name] for row, name in comparable if row.get(name) is not None]
    return means, [row[f"{name}_max"] for row, name in comparable if row.get(f"{name}_max") is not None]


def values(rows: Iterable[Row], name: str) -> list[float]:
    """A metric's values in the rows that have it."""
    return [row[name] for row in rows if row.get(name) is not None]


def total(rows: Iterable[Row], name: str) -> float | None:
    """A metric's sum, None when no row has it."""
    found = values(rows, name)
    return sum(found) if found else None


def measures(result: Row) -> dict[str, float | None]:
    """The three headline measures of one evaluation."""
    return {name: result.get(name) for name in MEASURES}


def fates(run: Run) -> Counter[str]:
    """How many profiled candidates were kept, and why the others were not; empty when the run selected none itself."""
    return Counter(run.counts("select_pivots"))


def text_table(run_dir: Path) -> str:
    """The summary for a terminal: seconds per stage, where the candidates went, and each measure before and after."""
    run = read_run(run_dir)
    numbers = summarise(run)
    seconds = {stage: value for stage, value in numbers["seconds"].items() if value is not None}
    lines = [f"{'stage':<20}{'seconds':>9}", *(f"{stage:<20}{value:>9.1f}" for stage, value in seconds.items())]
    lines += [f"{'total':<20}{sum(seconds.values()):>9.1f}", ""]
    lines.append(f"candidates {_shown(numbers['candidates'])}, profiled {_shown(numbers['profiled'])}, pivots {_shown(numbers['pivots'])}")
    if counts := fates(run):
        lines.append(table_line(counts))
    lines += ["", f"{'measure':<20}{'before':>9}{'after':>9}{'change':>9}"]
    for name in MEASURES:
        before, after = numbers["before"][name], numbers["after"][name]
        change = f"{after - before:+.3f}" if before is not None and after is not None else "-"
        lines.append(f"{name:<20}{_shown(before):>9}{_shown(after):>9}{change:>9}")
    return "\n".join(lines)


def _seconds(entry: Row | None) -> float | None:
    return entry["seconds"] if entry and entry.get("finished") else None


def _rate(rows: Sequence[Row], amount: str, seconds: str) -> float | None:
    """Amount per second over the rows that have both."""
    pairs = [(row[amount], row[seconds]) for row in rows if row.get(amount) is not None and row.get(seconds)]
    return sum(a for a, _ in pairs) / sum(s for _, s in pairs) if pairs else None


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
