"""The paper's comparison in miniature: SFT, end-to-end RL, PivotRL and its ablations from one pi_0, over several seeds (`make paper`)."""

import sys
from pathlib import Path

from pivotrl.paper.cells import SMOKE, Comparison, find_cells

__all__ = ["SMOKE", "Comparison", "find_cells", "run", "write_report"]


def run(comparison: Comparison, *, lanes: int) -> bool:
    """Run what is not done; whether everything is. Lists what failed with its reason and log."""
    from pivotrl.paper.runner import Runner

    runner = Runner(comparison, lanes=lanes)
    done = runner.run()
    print(f"{len(runner.board.done)} of {len(runner.board.jobs)} jobs are done, {runner.clock.spent()}")
    for failure in runner.board.failures:
        print(f"FAILED {failure.job}: {failure.reason}; log: {failure.log}", file=sys.stderr)
    return done


def write_report(root: Path) -> Path:
    """Write root/report: paper.html (returned), paper.md, summary.json, the figures.

    Raises:
        ValueError: nothing is finished yet.
    """
    from pivotrl.paper import page, summary
    from pivotrl.records import write_bytes, write_json

    outcome = summary.read(root)
    numbers = summary.summarise(outcome)
    folder = root / "report"
    write_json(folder / "summary.json", numbers)
    for name, text in page.documents(outcome.results, numbers).items():
        write_bytes(folder / name, text.encode())
    return folder / "paper.html"
