"""Synchronous against one-step-off asynchronous GRPO: the same pivots, policy and seeds, one config override between them.

    RUN=runs/quickstart; python tools/benchmarks/asynchronous.py --out out [--seeds 0 1 2] [--steps 30] [--max-staleness 1] \\
        experiment=quickstart candidates_path=$RUN/candidates pivots_path=$RUN/pivots profiles_path=$RUN/profiles model.hf_path=$RUN/hf/sft

Every run is recipes/train_grpo.py in a process of its own, one after the other. The folder gets asynchronous.json, .md and .svg; runs
that it already holds are not made again. A step's seconds are the time between two rows of metrics.jsonl, so the first step is left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PHASES = ("rollout_s", "logprobs_s", "update_s", "weight_sync_s", "engine_check_s")
MODES = ("synchronous", "asynchronous")
COLORS = {"synchronous": "#e0853d", "asynchronous": "#3b76d6"}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-staleness", type=int, default=1)
    parser.add_argument("overrides", nargs="+", help="of both runs, such as experiment=quickstart pivots_path=...")
    args = parser.parse_args()
    runs = {mode: [train(args, mode, seed) for seed in args.seeds] for mode in MODES}
    found = {"steps": args.steps, "seeds": args.seeds, "max_staleness": args.max_staleness, **compare(runs)}
    (args.out / "asynchronous.json").write_text(json.dumps(found, indent=2) + "\n")
    (args.out / "asynchronous.md").write_text(table(found))
    plot(found, args.out / "asynchronous.svg")
    print(table(found))


def train(args: argparse.Namespace, mode: str, seed: int) -> list[Row]:
    """The rows of one run's steps."""
    from pivotrl import metrics

    run = args.out / f"{mode}_{seed}"
    if len(metrics.read(run, "train_grpo")) < args.steps:
        staleness = args.max_staleness if mode == "asynchronous" else 0
        own = [f"run_dir={run}", f"seed={seed}", f"algorithm.num_steps={args.steps}", f"algorithm.max_staleness={staleness}"]
        quiet = ["logging.tensorboard=false", f"algorithm.checkpoint_every={args.steps}"]
        command = [sys.executable, "-W", "ignore", str(REPOSITORY / "recipes" / "train_grpo.py"), *args.overrides, *own, *quiet]
        subprocess.run(command, cwd=REPOSITORY, check=True)
    return metrics.read(run, "train_grpo")


def compare(runs: dict[str, list[list[Row]]]) -> dict[str, Any]:
    """Each mode's numbers, the speed-up of the median step, and the reward's difference step by step."""
    found: dict[str, Any] = {mode: describe(runs[mode]) for mode in MODES}
    sync, ahead = (found[mode] for mode in MODES)
    pairs = list(zip(sync["reward_mean"], ahead["reward_mean"], strict=True))
    differences = [[new - old for old, new in zip(*pair, strict=True)] for pair in pairs]
    return found | {
        "speed_up": sync["median_step_s"] / ahead["median_step_s"],
        "speed_up_by_seed": [a / b for a, b in zip(sync["median_step_s_by_seed"], ahead["median_step_s_by_seed"], strict=True)],
        # While rewards rise, rollouts that are one update older earn less; the last third tells where both arrive.
        "reward_difference": mean_and_error([value for values in differences for value in values]),
        "reward_difference_of_last_third": mean_and_error([value for values in differences for value in last_third(values)]),
    }


def mean_and_error(values: list[float]) -> dict[str, float]:
    """The standard error takes steps as independent, which they are not quite."""
    return {"mean": statistics.mean(values), "standard_error": statistics.stdev(values) / len(values) ** 0.5}


def last_third(values: list[float]) -> list[float]:
    return values[-(len(values) // 3) :]


def describe(seeds: list[list[Row]]) -> dict[str, Any]:
    from pivotrl.report.summary import staleness_counts

    later = [row for rows in seeds for row in rows[1:]]
    seconds = [[now["time"] - before["time"] for before, now in zip(rows, rows[1:], strict=False)] for rows in seeds]
    rewards = [[row["reward_mean"] for row in rows] for rows in seeds]
    last = [statistics.mean(last_third(values)) for values in rewards]
    return {
        "median_step_s": statistics.median(second for values in seconds for second in values),
        "median_step_s_by_seed": [statistics.median(values) for values in seconds],
        "median_phase_s": {name: statistics.median(row.get(name, 0.0) for row in later) for name in (*PHASES, "sampling_s")},
        "reward_mean": rewards,
        "reward_of_last_third_by_seed": last,
        "staleness_counts": {str(number): count for number, count in staleness_counts(row for rows in seeds for row in rows).items()},
        "importance_mean": statistics.mean(row["importance_mean"] for row in later if "importance_mean" in row),
        "capped_share": statistics.mean(row["capped_share"] for row in later if "capped_share" in row),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    sync, ahead = (found[mode] for mode in MODES)

    def shown(name: str) -> str:
        return f"{found[name]['mean']:+.4f} (standard error {found[name]['standard_error']:.4f})"

    def shares(mode: dict[str, Any]) -> str:
        counts = mode["staleness_counts"]
        return ", ".join(f"{number}: {100 * count / sum(counts.values()):.1f} %" for number, count in counts.items())

    def lasts(mode: dict[str, Any]) -> str:
        return ", ".join(f"{value:.3f}" for value in mode["reward_of_last_third_by_seed"])

    def line(name: str, show: Any) -> str:
        return f"| {name} | {show(sync)} | {show(ahead)} |"

    lines = [
        f"| {found['steps']} steps, seeds {', '.join(map(str, found['seeds']))} | synchronous | max_staleness {found['max_staleness']} |",
        "|---|---|---|",
        line("median seconds a step", lambda mode: f"{mode['median_step_s']:.3f}"),
        *(line(f"median {name}", lambda mode, name=name: f"{mode['median_phase_s'][name]:.3f}") for name in (*PHASES, "sampling_s")),
        line("mean reward of the last third, by seed", lasts),
        line("staleness of trained actions", shares),
        line("importance_mean", lambda mode: f"{mode['importance_mean']:.4f}"),
        line("capped_share", lambda mode: f"{mode['capped_share']:.1e}"),
        "",
        f"Speed-up of the median step {found['speed_up']:.2f} (by seed {', '.join(f'{x:.2f}' for x in found['speed_up_by_seed'])}).",
        f"Reward, asynchronous minus synchronous at equal steps: {shown('reward_difference')} over all steps, "
        f"{shown('reward_difference_of_last_third')} over the last third.",
    ]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Reward curves of all seeds, seconds per step by phase, staleness."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "pivotrl"}):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        reward, seconds, staleness = figure.subplots(1, 3, width_ratios=(2, 1.2, 1))
        for mode in MODES:
            curves = found[mode]["reward_mean"]
            steps = range(1, found["steps"] + 1)
            for curve in curves:
                reward.plot(steps, curve, color=COLORS[mode], alpha=0.25, linewidth=0.9)
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            reward.plot(steps, means, color=COLORS[mode], linewidth=2, label=f"{mode}, mean of {len(curves)} seeds")
        reward.set(title="mean reward", xlabel="step")
        reward.legend(frameon=False)
        bottoms = dict.fromkeys(MODES, 0.0)
        for name, color in zip(PHASES, ("#3b76d6", "#8f6bc9", "#e0853d", "#3a9e6e", "#a3a9b3"), strict=True):
            heights = [found[mode]["median_phase_s"][name] for mode in MODES]
            seconds.bar(MODES, heights, bottom=list(bottoms.values()), color=color, label=name.removesuffix("_s"), width=0.6)
            bottoms = {mode: bottoms[mode] + height for mode, height in zip(MODES, heights, strict=True)}
        seconds.set(title=f"median seconds a step by phase ({found['speed_up']:.2f}x)", ylim=(0, 1.45 * max(bottoms.values())))
        seconds.legend(frameon=False, ncols=2)
        for place, mode in enumerate(MODES):
            counts = found[mode]["staleness_counts"]
            shares = [100 * count / sum(counts.values()) for count in counts.values()]
            at = [int(number) + 0.4 * place - 0.2 for number in counts]
            staleness.bar(at, shares, width=0.38, color=COLORS[mode], label=mode)
        staleness.set(title="staleness, % of actions", xlabel="updates behind", ylim=(0, 130))
        staleness.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        staleness.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
