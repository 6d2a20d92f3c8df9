"""The comparison's tables as text cells, for the page and for Markdown alike; the paper's numbers stand beside ours with their marks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pivotrl.paper import published
from pivotrl.paper.cells import CELLS, METHODS
from pivotrl.paper.claims import SKILL_MARGIN, TASK_MARGIN
from pivotrl.paper.summary import spread

NONE = "–"
TITLES = {cell.name: cell.title for cell in CELLS}
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """`header` and every row have the same number of cells; the first cell of a row names it."""

    name: str
    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(numbers: Numbers) -> list[Table]:
    """All tables that the numbers can fill, in the page's order."""
    return [in_domain(numbers), out_of_domain(numbers), equal_success(numbers), ablations(numbers), costs(numbers)]


def in_domain(numbers: Numbers) -> Table:
    rows = []
    for name in METHODS:
        method = numbers["methods"].get(name)
        if method is not None:
            quoted = published.IN_DOMAIN.get(name, (NONE,) * len(published.BENCHMARKS))
            change = NONE if name == "base" else with_error(method["task_success_change_mean"])
            seeds = ", ".join(percent(value) for value in method["task_success"])
            sampled, greedy = percent_spread(method["task_success"]), percent_spread(method["greedy"]["task_success"])
            rows.append((TITLES[name], sampled, seeds, change, greedy, *map(str, quoted)))
    seeds, tasks = len(numbers["seeds"]), numbers["held_out_tasks"]
    note = (
        f"Held-out tasks solved alone in the environment, in percent: mean ± sample standard deviation over {seeds} seeds, {tasks} tasks. "
        f"Change: paired by seed and task, with its standard error. "
        f"Without sampling: the most likely token each time. To the right the paper's numbers on {published.MODEL}, another scale."
    )
    header = (
        "method",
        "tasks solved",
        "seed by seed",
        "change to pi_0",
        "without sampling",
        *(f"paper: {name}" for name in published.BENCHMARKS),
    )
    return Table("table_1", "Table 1: in domain", note, header, rows)


def out_of_domain(numbers: Numbers) -> Table:
    methods = numbers["methods"]
    trained = [name for name in METHODS if name != "base" and name in methods]
    families = next(iter(methods.values()))["skills"]
    rows = []
    for family in families:
        start = percent_spread(methods["base"]["skills"][family]) if "base" in methods else NONE
        rows.append((family, start, *(points_spread(methods[name]["skills_change"][family]) for name in trained)))
    start = percent_spread(methods["base"]["out_of_domain"]) if "base" in methods else NONE
    rows.append(("mean of all", start, *(points_spread(methods[name]["out_of_domain_change"]) for name in trained)))
    paper = published.OUT_OF_DOMAIN_CHANGE
    rows.append(("paper: mean of 8 benchmarks", NONE, *(paper[name].change if name in paper else NONE for name in trained)))
    note = (
        "Accuracy on unrelated skills that pi_0 was taught, on examples it never saw, in percent; then each method's change in points, "
        "mean ± sample standard deviation over seeds."
    )
    return Table("table_2", "Table 2: out of domain, by family", note, ("skill", "pi_0", *(TITLES[name] for name in trained)), rows)


def equal_success(numbers: Numbers) -> Table:
    found = numbers["rollout_turns_at_equal_success"]
    paper, ratio = published.EQUAL_TURNS, published.TURNS_RATIO
    rows = [
        (
            "rollout turns",
            count(found["pivotrl"]),
            count(found["e2e"]),
            times(found["ratio"]),
            f"{paper['pivotrl'].value:,.0f} against {paper['e2e'].value:,.0f} on SWE: {ratio.times}",
        ),
        (
            "rollout turns without profiling",
            count(None if found["pivotrl"] is None else found["pivotrl"] - found["profiling"]),
            count(found["e2e"]),
            times(found["training_ratio"]),
            "–",
        ),
        (
            "seconds",
            count(found["pivotrl_wall_s"]),
            count(found["e2e_wall_s"]),
            times(found["wall_ratio"]),
            published.WALL_RATIO.times,
        ),
    ]
    where = f"{percent(found['level'])} % of tasks solved" if found["level"] is not None else f"No such level: {found['reason']}"
    note = f"{where}. The level is the smaller of the two methods' best means; PivotRL pays for profiling first; curves are linear."
    header = ("until equal success", "PivotRL", "end-to-end RL", "ratio", f"paper ({published.MODEL})")
    return Table("equal_success", "Costs at equal success", note, header, rows)


def ablations(numbers: Numbers) -> Table:
    rows = []
    for name, method in numbers["methods"].items():
        if name in METHODS and name != "pivotrl":
            continue
        against = with_error(numbers["differences"].get(f"pivotrl - {name}"))
        quoted = published.ABLATION_TAU2.get(name, NONE)
        greedy = percent_spread(method["greedy"]["task_success"])
        cells = (percent_spread(method["task_success"]), against, greedy, points_spread(method["out_of_domain_change"]))
        rows.append((TITLES[name], *cells, count_mean(method["pivots"]), str(quoted)))
    note = (
        "Tasks solved in percent; PivotRL's lead over the row (paired, with its standard error); change on unrelated skills in points. "
        "All but the named choice is as in PivotRL."
    )
    header = ("cell", "tasks solved", "PivotRL less this", "without sampling", "skills", "pivots", "paper: tau2")
    return Table("table_4", "Table 4: ablations", note, header, rows)


def costs(numbers: Numbers) -> Table:
    rows = []
    for name, method in numbers["methods"].items():
        values = (method[key] for key in ("rollout_turns", "profiling_turns", "rollout_tokens", "wall_s", "profiling_wall_s"))
        rows.append((TITLES[name], *(count(value) for value in values)))
    note = (
        "Means over seeds, for the whole of training. A rollout turn is one sampled action; each cell pays its profile in full, also where "
        "cells share it. Seconds are those of profiling and training, without evaluation and without starts of Python and rollout servers; "
        "cells run side by side."
    )
    header = ("cell", "rollout turns", "of them profiling", "rollout tokens", "seconds", "of them profiling")
    return Table("costs", "What each cell cost", note, header, rows)


def claims(numbers: Numbers) -> Table:
    rows = [(claim["claim"], claim["verdict"], claim["sentence"], claim["paper"]) for claim in numbers["claims"]]
    note = (
        "Decided by the numbers below. A difference counts when it exceeds two standard errors; `no worse` holds where a loss of more than "
        f"{100 * TASK_MARGIN:g} points of tasks, or {100 * SKILL_MARGIN:g} points of skills, can be ruled out as surely, "
        "and fails where any loss is sure."
    )
    return Table("claims", "The paper's claims", note, ("claim", "verdict", "what was measured", "the paper"), rows)


def percent(value: float | None) -> str:
    """0.123 as 12.3."""
    return NONE if value is None else f"{100 * value:.1f}"


def percent_spread(values: Sequence[float | None]) -> str:
    found = spread(values)
    return NONE if found["mean"] is None else f"{percent(found['mean'])}{_plus_minus(found['sd'])}"


def points_spread(values: Sequence[float | None]) -> str:
    found = spread(values)
    return NONE if found["mean"] is None else f"{signed(found['mean'])}{_plus_minus(found['sd'])}"


def _plus_minus(sd: float | None) -> str:
    return "" if sd is None else f" ± {percent(sd)}"


def with_error(difference: Numbers | None) -> str:
    """A paired difference in points with its standard error."""
    if difference is None:
        return NONE
    error = difference["standard_error"]
    return signed(difference["mean"]) + ("" if error is None else f" (se {percent(error)})")


def signed(value: float) -> str:
    """A share as points with its sign."""
    points = round(100 * value, 1)
    return f"{points:+.1f}".replace("-", "\u2212") if points else "0.0"


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def count_mean(values: Sequence[float | None]) -> str:
    return count(spread(values)["mean"])


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}x"
