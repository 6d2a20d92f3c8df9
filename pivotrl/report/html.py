"""One self-contained page about a run: headline numbers, curves as inline SVG, tables and example pivots."""

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pivotrl.records import read_jsonl
from pivotrl.report.summary import Row, Run, fates, staleness_counts, values
from pivotrl.selection import FATES
from pivotrl.types import Group, Message, Pivot, Profile

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3b76d6", "#e0853d", "#3a9e6e", "#8f6bc9", "#a3a9b3"
INK = "#123456"  # never seen: stands for the page's text colour, which is another one in the dark
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "pivotrl", "font.family": "sans-serif", "font.size": 9.5,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": GREY, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.7, "legend.frameon": False,
    "legend.fontsize": 9,
}  # fmt: skip
PHASES = {
    "rollout_s": ("rollout", BLUE),
    "logprobs_s": ("logprobs", PURPLE),
    "update_s": ("update", ORANGE),
    "weight_sync_s": ("weight sync", GREEN),
    "engine_check_s": ("engine check", GREY),
}
SHADES = ("#c3d5f2", "#7fa5e3", BLUE, "#1f4a94", PURPLE)  # of staleness 0, 1, 2, 3, 4 and more
FATE_TEXT = {
    "kept": "kept as pivots",
    "too_easy": "too easy",
    "all_one": "always right",
    "all_zero": "always wrong",
    "over_long": "history too long",
    "verifier_failed": "verifier failed",
}
MEASURE_TEXT = {
    "pivot_reward": ("Held-out turn reward", "mean verdict on turns of experts that training never saw"),
    "task_success": ("Task success", "held-out tasks that the policy solves alone, from start to end"),
    "out_of_domain": ("Out of domain", "mean accuracy on unrelated skills: what was not to be lost"),
}
NUM_EXAMPLES, SMOOTHING, NEWEST_ROLLOUTS = 4, 7, 10


def render(run: Run, numbers: dict[str, Any]) -> str:
    """The page as HTML text; parts that the run lacks are left out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": share, "number": number, "duration": duration, "points": points, "signed": signed}
    finished = max((entry["finished"] for entry in run.manifest.values() if entry.get("finished")), default=None)
    return environment.get_template("report.html.jinja").render(
        run=run,
        numbers=numbers,
        total_s=sum(value for value in numbers["seconds"].values() if value is not None),
        finished=finished,
        stages=[(name, run.manifest[name]) for name in numbers["seconds"] if name in run.manifest],
        measures=MEASURE_TEXT,
        settings=settings(run),
        charts=charts(run),
        fates=[(FATE_TEXT.get(name, name), fates(run)[name], name == "kept") for name in [*FATES, *(set(fates(run)) - set(FATES))]],
        skills=sorted({skill for result in run.evaluations.values() for skill in result.get("skills", {})}),
        ends=sorted({end for result in run.evaluations.values() for end in result.get("episode_ends", {})}),
        examples=examples(run),
        versions=versions(run),
    )


def settings(run: Run) -> list[tuple[str, Any]]:
    """The few choices that a reader wants to know first, as they stood when the stages ran."""
    grpo, profile = run.manifest.get("train_grpo", {}).get("config", {}), run.manifest.get("profile_candidates", {}).get("config", {})
    algorithm, select = grpo.get("algorithm", {}), run.manifest.get("select_pivots", {}).get("config", {})
    found = [
        ("domain", run.manifest.get("extract_candidates", {}).get("config", {}).get("domain.name")),
        ("model", grpo.get("model", {}).get("name")),
        ("verifier", profile.get("domain.verifier") or grpo.get("domain.verifier")),
        ("samples per turn", profile.get("profile.num_samples")),
        ("selection", select.get("profile.rule")),
        ("GRPO steps", algorithm.get("num_steps")),
        ("pivots × group", f"{algorithm['pivots_per_step']} × {algorithm['group_size']}" if algorithm else None),
        ("learning rate", grpo.get("optimizer", {}).get("lr")),
    ]
    return [(name, value) for name, value in found if value is not None]


def versions(run: Run) -> str:
    """Package versions, once; they are the same for all stages or the difference is shown."""
    found: dict[str, set[str]] = {}
    for entry in run.manifest.values():
        for package, version in entry.get("versions", {}).items():
            found.setdefault(package, set()).add(version)
    return ", ".join(f"{package} {' / '.join(sorted(seen))}" for package, seen in found.items())


# -- charts ------------------------------------------------------------------------------------------------------------------------


def charts(run: Run) -> list[dict[str, Any]]:
    """Title, one sentence and SVG of every chart that the run has numbers for, in the order of the page."""
    grpo, found = run.grpo, []

    def add(title: str, note: str, draw: Callable[[Axes], None], *, when: bool) -> None:
        if when:
            found.append({"title": title, "note": note, "svg": chart(draw)})

    def curves(title: str, note: str, names: dict[str, tuple[str, str]], rows: Sequence[Row] = grpo, **axis: Any) -> None:
        add(title, note, lambda axes: lines(axes, rows, names, **axis), when=any(values(rows, name) for name in names))

    note = "Mean of each step's rollouts; the thick line is a moving average."
    add("Reward", note, lambda axes: reward(axes, grpo), when=bool(values(grpo, "reward_mean")))
    note = "Share of groups whose rewards are all equal: they cost nothing and teach nothing."
    curves("Groups without signal", note, {"dead_group_share": ("", GREY)}, bottom=0, top=1)
    note = "Turns by the share of right samples before training. Pivots: sometimes right, below the limit."
    add("Mean reward of profiled turns", note, lambda axes: histogram(axes, run), when=any(not p.excluded for p in run.profiles))
    curves("Entropy", "Nats per action token of the policy.", {"entropy": ("", PURPLE)}, bottom=0)
    note = "Share of tokens whose ratio was clipped (none with one update a step); KL to the first policy, when it is on."
    curves("Clipping and KL", note, {"clip_fraction": ("clip fraction", ORANGE), "kl": ("KL", BLUE)}, bottom=0)
    ahead, proof = any(values(grpo, "engine_gap")), "Difference of their logprobs per token, in nats, log scale: proof that "
    gap = "engine_gap" if ahead else "logprob_gap"
    note = proof + ("the engines held each step's weights, on a few probes." if ahead else "each step sampled from the newest weights.")
    curves("Trainer against rollout engine", note, {f"{gap}_max": ("largest", ORANGE), gap: ("mean", BLUE)}, log=True)
    note = "Sampled actions by how many updates the policy was ahead of the one that they came from."
    add("Staleness", note, lambda axes: staleness(axes, grpo), when=any(value > 0 for value in values(grpo, "staleness_max")))
    note = "Where the time of a training step went." + " Rollout: what of the sampling was not hidden behind an update." * ahead
    add("Seconds per step", note, lambda axes: phases(axes, grpo), when=any(values(grpo, name) for name in PHASES))
    curves("Gradient norm", "Before clipping.", {"grad_norm": ("", GREEN)}, bottom=0)
    note = "Loss of the warm-up that made the first policy, in nats per token."
    curves("Supervised warm-up", note, {"loss": ("", BLUE)}, run.sft, bottom=0)
    return found


def chart(draw: Callable[[Axes], None]) -> Markup:
    """An SVG that takes the page's width, fonts and text colour."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1)
    return Markup(re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg))


def lines(
    axes: Axes,
    rows: Sequence[Row],
    names: dict[str, tuple[str, str]],
    *,
    log: bool = False,
    bottom: float | None = None,
    top: float | None = None,
) -> None:
    """Metrics over steps; one point is a dot."""
    for name, (label, color) in names.items():
        points_ = [(row["step"] + 1, row[name]) for row in rows if row.get(name) is not None and (row[name] > 0 or not log)]
        if points_:
            axes.plot(*zip(*points_, strict=True), label=label, color=color, marker="o" if len(points_) < 3 else None, markersize=4)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        positive = [value for name in names for value in values(rows, name) if value > 0]
        if positive:
            axes.set_ylim(10 ** math.floor(math.log10(min(positive))), 10 ** math.ceil(math.log10(1.01 * max(positive))))
    else:
        # A flat line at zero would get an axis of meaningless tiny numbers around it.
        high = max((value for name in names for value in values(rows, name)), default=0.0)
        axes.set_ylim(bottom, top if top is not None else (None if high > 0 else 1))
    _finish(axes, legend=any(label for label, _ in names.values()))


def reward(axes: Axes, rows: Sequence[Row]) -> None:
    """Mean reward with its moving average, and the deviation inside groups."""
    steps, means = zip(*((row["step"] + 1, row["reward_mean"]) for row in rows if row.get("reward_mean") is not None), strict=True)
    smooth = []
    for i in range(len(means)):
        window = means[max(0, i - SMOOTHING // 2) : i + SMOOTHING // 2 + 1]
        smooth.append(sum(window) / len(window))
    axes.plot(steps, means, color=BLUE, linewidth=0.9, alpha=0.45, marker="o", markersize=2)
    axes.plot(steps, smooth, color=BLUE, linewidth=2.2, label="mean")
    lines(axes, rows, {"reward_std": ("deviation in a group", ORANGE)}, bottom=min(0.0, *means), top=max(1.0, *means))


def histogram(axes: Axes, run: Run) -> None:
    """Profiles by mean reward, those that became pivots in another colour, on a log scale since all-pass turns dwarf the rest."""
    used = [p for p in run.profiles if not p.excluded]
    pivots = {pivot.candidate.id for pivot in run.pivots}
    size = max(1, min(20, max(len(p.samples) for p in used)))
    edges = [(i - 0.5) / size for i in range(size + 2)]
    kept = [p.mean for p in used if p.candidate_id in pivots]
    left = [p.mean for p in used if p.candidate_id not in pivots]
    counts, *_ = axes.hist([kept, left], bins=edges, stacked=True, color=[BLUE, GREY], label=["pivots", "left out"], rwidth=0.86)
    limit = run.manifest.get("select_pivots", {}).get("config", {}).get("profile.max_mean")
    if limit is not None:
        axes.axvspan(0.5 / size, limit, color=BLUE, alpha=0.09, linewidth=0)
        axes.axvline(limit, color=BLUE, linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 5 * max(map(max, counts)))  # room for the legend
    axes.yaxis.set_major_locator(matplotlib.ticker.FixedLocator([0, 1, 10, 100, 1000, 10_000, 100_000]))
    axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("mean reward")
    axes.set_ylabel("turns")
    axes.legend(loc="upper center", ncols=2)


def phases(axes: Axes, rows: Sequence[Row]) -> None:
    """Seconds of every phase, stacked."""
    shown = {name: look for name, look in PHASES.items() if sum(values(rows, name)) > 0}
    steps, bottom = [row["step"] + 1 for row in rows], [0.0] * len(rows)
    for name, (label, color) in shown.items():
        seconds = [row.get(name) or 0.0 for row in rows]
        axes.bar(steps, seconds, bottom=bottom, width=0.86, color=color, label=label, linewidth=0)
        bottom = [low + value for low, value in zip(bottom, seconds, strict=True)]
    axes.set_ylim(0, max(bottom) * 1.28 or 1)  # room for the legend
    _finish(axes, legend=True)


def staleness(axes: Axes, rows: Sequence[Row]) -> None:
    """How many actions of each staleness every step trained on, stacked, and their shares over the run."""
    counts = staleness_counts(rows)
    steps, bottom = [row["step"] + 1 for row in rows], [0.0] * len(rows)
    for number, count in counts.items():
        heights = [row.get(f"staleness_count_{number}") or 0.0 for row in rows]
        label = f"{number}: {share(count / sum(counts.values()))}"
        axes.bar(steps, heights, bottom=bottom, width=0.86, color=SHADES[max(0, min(number, 4))], label=label, linewidth=0)
        bottom = [low + value for low, value in zip(bottom, heights, strict=True)]
    axes.set_ylim(0, max(bottom) * 1.28 or 1)  # room for the legend
    axes.set_ylabel("actions")
    _finish(axes, legend=True)


def _finish(axes: Axes, *, legend: bool) -> None:
    axes.set_xlabel("step")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=6))
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="best" if len(axes.containers) == 0 else "upper center",
            ncols=4 if axes.containers else 1,
            handlelength=1.2,
            columnspacing=1.0,
        )


# -- example pivots ----------------------------------------------------------------------------------------------------------------


def examples(run: Run) -> list[dict[str, Any]]:
    """A few pivots with their different samples: how often each came before training, and in the newest training step that drew it."""
    profiles = {profile.candidate_id: profile for profile in run.profiles}
    newest = _newest_groups(run.path / "rollouts") if run.pivots else {}  # the rollouts of end-to-end RL are episodes
    found: dict[str, dict[str, Any]] = {}
    # One for each kind of expert action; those seen in training first, then those on which the first policy was most divided.
    for pivot in sorted(run.pivots, key=lambda p: (p.candidate.id not in newest, -p.variance, p.candidate.id)):
        kind = ", ".join(call.name for call in pivot.candidate.expert.tool_calls) or "message"
        if kind not in found and pivot.candidate.id in profiles:
            found[kind] = {"kind": kind} | _example(pivot, profiles[pivot.candidate.id], newest.get(pivot.candidate.id))
        if len(found) == NUM_EXAMPLES:
            break
    return list(found.values())


def _newest_groups(folder: Path) -> dict[str, tuple[int, Group]]:
    """The last few steps' groups by candidate, the newest of each, with their steps counted from one."""
    found: dict[str, tuple[int, Group]] = {}
    for path in sorted(folder.glob("step_*.jsonl"), reverse=True)[:NEWEST_ROLLOUTS]:
        for group in read_jsonl(path, Group):
            found.setdefault(group.candidate_id, (int(path.stem.removeprefix("step_")) + 1, group))
    return found


def _example(pivot: Pivot, profile: Profile, newest: tuple[int, Group] | None) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}

    def count(text: str, column: str, reward: float, reason: str) -> None:
        row = rows.setdefault(text, {"text": _one_line(text), "reward": reward, "reason": reason, "before": 0, "after": 0})
        row[column] += 1

    for sample in profile.samples:
        count(sample.text, "before", sample.reward, sample.reason if sample.status == "ok" else f"dropped: {sample.status}")
    rollouts = newest[1].rollouts if newest else ()
    for rollout in rollouts:
        ok = rollout.verdict.status == "ok"
        count(rollout.text, "after", rollout.verdict.reward, rollout.verdict.reason if ok else f"dropped: {rollout.verdict.status}")
    judged = [r.verdict.reward for r in rollouts if r.verdict.status == "ok"]
    ordered = sorted(rows.values(), key=lambda row: (-row["before"] - row["after"], row["text"]))
    history = pivot.candidate.history
    return {
        "trajectory": pivot.candidate.trajectory_id,
        "turn": pivot.candidate.turn,
        "context": [(message.role, _clip(_message_text(message), 420)) for message in history[-2:]],
        "earlier": max(0, len(history) - 2),
        "expert": _clip(_message_text(pivot.candidate.expert.to_message()), 420),
        "samples": ordered[:6],
        "more": len(ordered) - 6,
        "num_before": len(profile.samples),
        "num_after": len(rollouts),
        "step": newest[0] if newest else None,
        "mean_before": pivot.mean,
        "mean_after": sum(judged) / len(judged) if judged else None,
    }


def _message_text(message: Message) -> str:
    calls = [f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})" for call in message.tool_calls]
    return "\n".join(part for part in (message.content, *calls) if part)


def _one_line(text: str) -> str:
    """A sampled completion without the wrapping that every tool call has."""
    return _clip(" ".join(re.sub(r"</?tool_call>", " ", text).split()), 260) or "(empty)"


def _clip(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 2].rstrip() + " …"


# -- how numbers are written -------------------------------------------------------------------------------------------------------


def share(value: float | None) -> str:
    """0.123 as 12.3 %."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(before: float | None, after: float | None) -> float | None:
    """The difference of two shares in percentage points."""
    return None if before is None or after is None else round(100 * (after - before), 1)


def signed(change: float | None) -> str:
    """A difference with its sign, a nought without one."""
    return "–" if change is None else f"{change:+.1f}".replace("-", "\u2212") if change else "0.0"


def number(value: float | None) -> str:
    """Three digits that matter; thousands apart, tiny values as powers of ten."""
    if value is None:
        return "–"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
