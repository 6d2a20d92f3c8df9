"""The comparison's report: one self-contained page, and the same as Markdown with its figures beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from pivotrl.paper import claims, figures, tables
from pivotrl.paper.tables import Table
from pivotrl.report.html import TEMPLATES, chart

TITLE = "PivotRL's claims, in miniature"
NOTES = {
    "figure_1": (
        "Figure 1: success against cost",
        "Held-out tasks during training, each seed thin, the mean thick. PivotRL's curve begins behind profiling; pi_0 and SFT are levels.",
    ),
    "figure_3": (
        "Figure 3: batch reward deviation",
        "The deviation of rewards inside groups, mean over seeds, smoothed.",
    ),
    "figure_4": ("Every cell, every seed", "A dot for each seed, a bar at the mean, which stands to the right."),
}
VERDICTS = {claims.HOLDS: ("up", "✓"), claims.FAILS: ("down", "✗"), claims.OPEN: ("", "?")}


def documents(results: figures.Results, numbers: dict[str, Any]) -> dict[str, str]:
    """Text by file name: paper.html, paper.md and the figures."""
    drawn = figures.figures(results)
    files = {f"{name}.svg": figures.svg_file(panels) for name, panels in drawn.items()}
    return {"paper.html": html(drawn, numbers), "paper.md": markdown(drawn, numbers), **files}


def html(drawn: Mapping[str, Sequence[figures.Panel]], numbers: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("paper.html.jinja").render(
        title=TITLE,
        lead=lead(numbers),
        missing=missing(numbers),
        numbers=numbers,
        verdicts=VERDICTS,
        claims_note=tables.claims(numbers).note,
        tables={table.name: table for table in tables.tables(numbers)},
        figures={name: (*NOTES[name], [(panel.title, chart(panel.draw)) for panel in panels]) for name, panels in drawn.items()},
        sizes=sizes(numbers),
    )


def markdown(drawn: Mapping[str, Any], numbers: dict[str, Any]) -> str:
    found = {table.name: table for table in tables.tables(numbers)}
    parts = [f"# {TITLE}", lead(numbers), missing(numbers), _markdown_table(tables.claims(numbers))]
    for name in ("table_1", "figure_1", "equal_success", "table_2", "table_4", "figure_4", "figure_3", "costs"):
        if name in found:
            parts.append(_markdown_table(found[name]))
        elif name in drawn:
            title, note = NOTES[name]
            parts.append(f"## {title}\n\n{note}\n\n![{title}]({name}.svg)")
    parts.append("## Sizes\n\n" + "\n".join(f"- {group}: {text}" for group, text in sizes(numbers)))
    return "\n\n".join(part for part in parts if part) + "\n"


def lead(numbers: dict[str, Any]) -> str:
    """Where the numbers come from, in a few sentences."""
    sizes_, seeds = numbers["sizes"], len(numbers["seeds"])
    commits = ", ".join(commit[:10] + ("+dirty" if commit.endswith("+dirty") else "") for commit in numbers["git"]) or "unknown"
    changed = f"Set otherwise: {', '.join(numbers['overrides'])}. " if numbers["overrides"] else ""
    return (
        f"{numbers['date']}, commit {commits}. Model {sizes_['model']['name']}, domain {sizes_['domain']['name']}, {seeds} seeds, "
        f"{numbers['held_out_tasks']} held-out tasks. All methods start from the same pi_0 and the same expert trajectories. "
        f"{changed}The paper's own numbers are of a 30B model on four benchmarks: compare directions and ratios, not values."
    )


def missing(numbers: dict[str, Any]) -> str:
    """Which cells are not finished, or nothing."""
    absent = [f"{name} (seeds {', '.join(map(str, seeds))})" for name, seeds in numbers["missing"].items()]
    return f"Not in this report: {'; '.join(absent)}." if absent else ""


def sizes(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """The configured sizes, a line for each group."""
    return [(group, ", ".join(f"{name} {value}" for name, value in chosen.items())) for group, chosen in numbers["sizes"].items()]


def _markdown_table(table: Table) -> str:
    rows = [table.header, ["---"] + ["---:" if table.name != "claims" else "---"] * (len(table.header) - 1), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return f"## {table.title}\n\n{table.note}\n\n" + "\n".join(lines)
