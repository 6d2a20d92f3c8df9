"""What a run did, from its folder alone: numbers for programs (summary.json), a page for people (report.html), a table for the terminal."""

from pathlib import Path

from pivotrl.records import write_bytes, write_json
from pivotrl.report.summary import read_run, summarise, summary, text_table

__all__ = ["summary", "text_table", "write"]


def write(run_dir: Path) -> Path:
    """Write report/summary.json and report/report.html into the run folder and return the page's path.

    Raises:
        ValueError: the folder holds no run, or one of its files is damaged.
    """
    from pivotrl.report.html import render  # matplotlib: only a page needs it

    run = read_run(run_dir)
    numbers = summarise(run)
    write_json(run_dir / "report" / "summary.json", numbers)
    path = run_dir / "report" / "report.html"
    write_bytes(path, render(run, numbers).encode())
    return path
