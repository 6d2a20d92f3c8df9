"""Tokens that a training step computes: dense, with each pivot's history once, and with the trajectories' nested histories shared.

    python tools/benchmarks/prefix_savings.py runs/quickstart/candidates [--group 16] [--share 0.25] [--trajectories 100]

Pivots are a random share of the turns of each trajectory; a pivot's G actions are expert actions of the whole folder, its own first.
The tokenizer is trained on the folder's own text. Counts are those of the rows that training would pack.
"""

import argparse
import json
import random
from pathlib import Path

from pivotrl.batching import Item, pack
from pivotrl.candidates import load_tools
from pivotrl.records import read_jsonl
from pivotrl.render import Renderer
from pivotrl.tokenizer import compact_text, train_tokenizer
from pivotrl.types import Candidate, Trajectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", type=Path)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.25, help="share of turns that are pivots")
    parser.add_argument("--trajectories", type=int, default=100)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--row-tokens", type=int, default=16_384)
    args = parser.parse_args()
    texts = [compact_text(t.messages) for t in read_jsonl(args.candidates / "trajectories.jsonl", Trajectory)]
    renderer = Renderer(train_tokenizer(texts, args.vocab))
    tools = load_tools(args.candidates)
    turns: dict[str, list[Candidate]] = {}
    for candidate in read_jsonl(args.candidates / "candidates.jsonl", Candidate):
        turns.setdefault(candidate.trajectory_id, []).append(candidate)
    chosen = list(turns.items())[: args.trajectories]
    rng = random.Random(0)
    experts = [c for _, candidates in chosen for c in candidates]
    items: list[tuple[str, str, Item]] = []
    for trajectory_id, candidates in chosen:
        for pivot in rng.sample(candidates, max(1, round(args.share * len(candidates)))):
            prompt = renderer.prompt(pivot.history, tools[pivot.tools])
            for source in [pivot, *rng.sample(experts, args.group - 1)]:
                action = renderer.action_ids(source.expert, source.history, tools[source.tools])
                items.append((trajectory_id, pivot.id, Item([*prompt, *action], range(len(prompt), len(prompt) + len(action)))))

    def tokens(position: int, shared: bool) -> int:
        """All row tokens when the items with equal key at `position` (0 trajectory, 1 pivot) are packed together."""
        units: dict[str, list[Item]] = {}
        for entry in items:
            units.setdefault(str(entry[position]), []).append(entry[2])
        rows = [row for unit in units.values() for row in pack(unit, max_row_tokens=args.row_tokens, shared_prefix=shared)]
        return sum(len(row.token_ids_T) for row in rows)

    dense, once, nested = tokens(1, False), tokens(1, True), tokens(0, True)
    result = {"trajectories": len(chosen), "pivots": len({pivot for _, pivot, _ in items}), "group": args.group}
    result |= {"dense_tokens": dense, "history_once_tokens": once, "nested_tokens": nested}
    print(json.dumps(result | {"history_once_ratio": round(dense / once, 2), "nested_ratio": round(dense / nested, 2)}, indent=2))


if __name__ == "__main__":
    main()
