"""Runs the paper's comparison in miniature (`make paper`), and writes its report. docs/paper.md says what is compared.

    python tools/paper.py                                     # every cell with three seeds into runs/paper
    python tools/paper.py --smoke                             # a few cells, the smallest sizes, into runs/paper_smoke
    python tools/paper.py --only base pivotrl --seeds 0       # some cells, one seed; what is done stays
    python tools/paper.py --folder runs/sql --override domain=sql

Stopped or killed, the same command goes on. Exit code 1: cells failed, and were listed with their logs; 85: stopped.
"""

import argparse
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="experiment=paper_smoke and a few cells, with two seeds")
    parser.add_argument("--folder", type=Path, help="of the comparison; default runs/paper or runs/paper_smoke")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="these cells, and the profiles that they need")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default 0 1 2, or 0 1 with --smoke")
    parser.add_argument("--ablation-seeds", nargs="+", type=int, metavar="SEED", help="default the same, or 0 with --smoke")
    parser.add_argument("--lanes", type=int, default=2, help="cells that run side by side, each lane with a rollout server (default 2)")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the report of what is there")
    parser.add_argument("--warm-up", type=Path, metavar="FOLDER", help="the careful half of another comparison, FOLDER/warm_up there")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="Hydra overrides for every stage")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from pivotrl import paper

    experiment = "paper_smoke" if args.smoke else "paper"
    try:
        folder = args.folder or Path("runs") / experiment
        done = True
        if not args.report_only:
            seeds = args.seeds or ((0, 1) if args.smoke else (0, 1, 2))
            ablation_seeds = args.ablation_seeds or ((0,) if args.smoke else seeds)
            cells = paper.find_cells(args.only or (paper.SMOKE if args.smoke else None))
            overrides = tuple(args.override)
            comparison = paper.Comparison(folder, experiment, tuple(seeds), cells, overrides, tuple(ablation_seeds), args.warm_up)
            done = paper.run(comparison, lanes=args.lanes)
        print(f"report: {paper.write_report(folder)}")
    except (HydraException, OmegaConfBaseException, ValueError, FileNotFoundError) as error:
        sys.exit(f"paper: {error}")
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    main()
