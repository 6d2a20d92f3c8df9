"""The comparison's figures: success against what it cost, reward deviation over training, success of every cell."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pivotrl.paper.cells import CELLS
from pivotrl.paper.results import Result
from pivotrl.paper.statistics import mean, mean_curve
from pivotrl.report.html import BLUE, GREY, INK, ORANGE, PURPLE, SMOOTHING, STYLE

Results = Mapping[str, Mapping[int, Result]]
PAGE_INK = "#1e2530"
# Told apart by dashes and markers too, not by colour alone.
LOOKS = {
    "pivotrl": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "e2e": {"color": ORANGE, "linestyle": (0, (5, 2)), "marker": "s"},
    "random": {"color": ORANGE, "linestyle": (0, (5, 2)), "marker": "s"},
    "strict": {"color": PURPLE, "linestyle": (0, (1, 1.2)), "marker": "^"},
    "keep_all_zero": {"color": GREY, "linestyle": (0, (6, 1.5, 1, 1.5)), "marker": "D"},
}
AXES = {"turns": "rollout turns", "tokens": "rollout tokens", "wall_s": "seconds, without evaluation"}


class Panel(NamedTuple):
    """One set of axes: its title, how to draw it, its size in inches (small ones stand side by side)."""

    title: str
    fill: Callable[[Axes], None]
    width: float = 6.4
    height: float = 3.0

    def draw(self, axes: Axes) -> None:
        """Draw into axes that have a figure of their own."""
        axes.figure.set_size_inches(self.width, self.height)
        self.fill(axes)


def figures(results: Results) -> dict[str, list[Panel]]:
    """Panels by the figure's file name; a figure without numbers is left out."""
    found: dict[str, list[Panel]] = {}
    if any(len(mean_curve(results.get(name, {}))) > 1 for name in ("pivotrl", "e2e")):
        draws = {text.partition(",")[0]: partial(success, results=results, unit=unit) for unit, text in AXES.items()}
        found["figure_1"] = [Panel(f"against {text}", draw, 3.7, 2.8) for text, draw in draws.items()]
    shown = [name for name in ("pivotrl", "random", "strict", "keep_all_zero") if _deviations(results.get(name, {}))]
    if shown:
        found["figure_3"] = [Panel("reward deviation", partial(deviations, results=results, names=shown))]
    found["figure_4"] = [Panel("tasks solved", partial(dots, results=results), height=0.8 + 0.27 * len(results))]
    return found


def svg_file(panels: Sequence[Panel]) -> str:
    """A figure of its own on white, panels side by side."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(sum(panel.width for panel in panels), max(panel.height for panel in panels)), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel.fill(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue().replace(INK, PAGE_INK)


def success(axes: Axes, results: Results, unit: str) -> None:
    """Held-out task success over a cost: each seed thin, the mean thick; base and SFT as levels with their names."""
    far = 0.0
    for name in ("pivotrl", "e2e"):
        look = LOOKS[name]
        for result in results.get(name, {}).values():
            xs, ys = [getattr(point.cost, unit) for point in result.curve], [point.success for point in result.curve]
            axes.plot(xs, ys, color=look["color"], linewidth=0.8, alpha=0.4)
            far = max([far, *xs])
        curve = mean_curve(results.get(name, {}))
        if curve:
            xs, ys = [getattr(point.cost, unit) for point in curve], [point.success for point in curve]
            axes.plot(xs, ys, markersize=4, linewidth=2, label={"pivotrl": "PivotRL", "e2e": "end-to-end RL"}[name], **look)
    for name, text, side in (("base", "pi_0", "top"), ("sft", "SFT", "bottom")):
        if results.get(name):
            level = mean([result.success for result in results[name].values()])
            axes.axhline(level, color=GREY, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(text, (1, level), xycoords=("axes fraction", "data"), ha="right", va=side, fontsize=8.5)
    axes.set_xlim(0, far * 1.04 or 1)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.05) - 0.1 * (high - low), high if high > 0.06 else 1)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(lambda value, position: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(AXES[unit])
    axes.set_ylabel("held-out tasks solved")
    axes.legend(loc="best")


def deviations(axes: Axes, results: Results, names: Sequence[str]) -> None:
    """Mean over seeds, smoothed over a few steps."""
    titles = {cell.name: cell.title for cell in CELLS}
    for name in names:
        values = _deviations(results[name])
        smooth = [mean(values[max(0, i - SMOOTHING // 2) : i + SMOOTHING // 2 + 1]) for i in range(len(values))]
        every = max(1, len(values) // 6)
        axes.plot(range(1, len(smooth) + 1), smooth, label=titles[name], markersize=3.5, markevery=every, **LOOKS[name])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("standard deviation of rewards")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, nbins=6))
    axes.legend(loc="best")


def _deviations(results: Mapping[int, Result]) -> list[float]:
    """The mean over seeds by step, as far as all of them go."""
    series = [result.deviations for result in results.values() if result.deviations]
    return [mean(values) for values in zip(*series, strict=False)]


def dots(axes: Axes, results: Results) -> None:
    """One row a cell: a dot for each seed, a bar at the mean with its number."""
    titles = {cell.name: cell.title for cell in CELLS}
    top = max(result.success for found in results.values() for result in found.values())
    for row, (name, found) in enumerate(results.items()):
        values = [result.success for result in found.values()]
        color = BLUE if name == "pivotrl" else GREY
        axes.plot(values, [row] * len(values), "o", color=color, markersize=4.5, alpha=0.75, clip_on=False)
        axes.plot([mean(values)] * 2, [row - 0.32, row + 0.32], color=color, linewidth=2.4, clip_on=False)
        axes.annotate(f"{100 * mean(values):.1f}", (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(results)), [titles[name] for name in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlim(0, min(1.0, 1.08 * top) or 1)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("held-out tasks solved")
