"""Packs scored token sequences into rows. A row is a forest of token segments: what sequences share stands there once.

With sharing, a pivot's history is computed once for its G actions (P + G*R tokens instead of G*(P+R)), turns of one
trajectory share their growing history, and equal actions coincide. Without, each sequence is a segment of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

MIN_SHARED = 16  # a shorter common prefix is cheaper to repeat than to split a segment for


@dataclass
class Item:
    """One sequence of which some tokens are scored: `token_ids[t]` for t in `scored`, each with one number per field.

    `unit` groups items that belong in one row if they fit (one pivot, or one trajectory).
    """

    token_ids: Sequence[int]
    scored: Sequence[int]
    unit: str = ""
    fields: dict[str, Sequence[float]] = field(default_factory=dict)


@dataclass
class Row:
    """One packed row: T tokens in N segments (start, end, parent), S scored entries.

    Entry s is the logprob of `targets_S[s]` predicted from position `positions_S[s]`; `fields` hold S numbers each.
    `owners_S` is the index of the entry's item in the list that `pack` was given.
    """

    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    segments_N3: torch.Tensor
    positions_S: torch.Tensor
    targets_S: torch.Tensor
    owners_S: torch.Tensor
    fields: dict[str, torch.Tensor]

    @property
    def cost(self) -> float:
        """Relative compute: linear in tokens plus attention's pairs, in units of one token's dense layers."""
        lengths = (self.segments_N3[:, 1] - self.segments_N3[:, 0]).double()
        ends = torch.tensor([float(self.position_ids_T[end - 1]) + 1 for end in self.segments_N3[:, 1]])
        return float(len(self.token_ids_T) + (lengths * (ends - lengths / 2)).sum() / 8192)


@dataclass
class _Node:
    token_ids: list[int]
    start: int  # position of the first token in its sequences
    children: list["_Node"] = field(default_factory=list)
    row_start: int = 0


def _common(a: Sequence[int], b: Sequence[int], offset: int) -> int:
    """Length of the common prefix of a and b[offset:]."""
    limit = min(len(a), len(b) - offset)
    if list(a[:limit]) == list(b[offset : offset + limit]):
        return limit
    return next(i for i in range(limit) if a[i] != b[offset + i])


class _Forest:
    """The segments of one row, grown sequence by sequence."""

    def __init__(self, share: bool):
        self.share = share
        self.roots: list[_Node] = []
        self.num_tokens = 0

    def _best(self, nodes: list[_Node], token_ids: Sequence[int], offset: int) -> tuple[_Node | None, int]:
        lengths = [(_common(node.token_ids, token_ids, offset), node) for node in nodes]
        length, node = max(lengths, key=lambda pair: pair[0], default=(0, None))
        return node, length

    def add(self, token_ids: Sequence[int]) -> None:
        nodes, offset, parent = self.roots, 0, None
        while self.share:
            node, length = self._best(nodes, token_ids, offset)
            if node is None or length == 0:
                break
            if offset + length == len(token_ids):
                return  # the sequence is already there, inside or at the end of this node
            if length < len(node.token_ids):
                if length < MIN_SHARED:
                    break
                self._split(node, length)
            nodes, offset, parent = node.children, offset + length, node
        rest = list(token_ids[offset:])
        self.num_tokens += len(rest)
        if parent is not None and not parent.children:
            parent.token_ids += rest  # a sequence that only grows (the turns of one trajectory) stays one segment
        else:
            nodes.append(_Node(rest, offset))

    @staticmethod
    def _split(node: _Node, length: int) -> None:
        tail = _Node(node.token_ids[length:], node.start + length, node.children)
        node.token_ids, node.children = node.token_ids[:length], [tail]

    def cost_of(self, token_ids: Sequence[int]) -> int:
        """Tokens that `add` would bring in, at most."""
        nodes, offset = self.roots, 0
        while self.share:
            node, length = self._best(nodes, token_ids, offset)
            if node is None or (length < len(node.token_ids) and length < MIN_SHARED and offset + length < len(token_ids)):
                break
            offset += length
            if length < len(node.token_ids) or offset == len(token_ids):
                break
            nodes = node.children
        return len(token_ids) - offset

    def lay_out(self) -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
        """(token ids, position ids, segments): parents before children, the children of one parent side by side."""
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[tuple[int, int, int]] = []
        queue = [(root, -1) for root in self.roots]
        while queue:
            node, parent = queue.pop(0)
            node.row_start = len(tokens)
            tokens += node.token_ids
            positions += range(node.start, node.start + len(node.token_ids))
            segments.append((node.row_start, len(tokens), parent))
            queue += [(child, len(segments) - 1) for child in node.children]
        return tokens, positions, segments

    def locate(self, token_ids: Sequence[int], claimed: set[int]) -> list[int]:
        """Row index of every token of a sequence that was added. Without sharing each sequence claims a root of its own."""
        if not self.share:
            node = next(n for n in self.roots if id(n) not in claimed and n.token_ids == list(token_ids))
            claimed.add(id(node))
            return list(range(node.row_start, node.row_start + len(token_ids)))
        where: list[int] = []
        nodes = self.roots
        while len(where) < len(token_ids):
            node, length = self._best(nodes, token_ids, len(where))
            assert node is not None and length > 0, "a packed sequence lost its path"
            where += range(node.row_start, node.row_start + length)
            nodes = node.children
        return where


def pack(items: Sequence[Item], *, max_row_tokens: int, shared_prefix: bool) -> list[Row]:
    """Pack items into rows of at most `max_row_tokens` tokens, keeping items of one unit together where they fit.

    Items of which nothing is scored are left out.

    Raises:
        ValueError: one item alone is longer than a row.
    """
    rows: list[Row] = []
    forest, members = _Forest(shared_prefix), []

    def close_row() -> None:
        nonlocal forest, members
        if members:
            rows.append(_make_row(forest, items, members))
        forest, members = _Forest(shared_prefix), []

    for unit in _units(items, max_row_tokens):
        alone = _Forest(shared_prefix)
        for index in unit:
            alone.add(items[index].token_ids)
        first = items[unit[0]].token_ids
        added = alone.num_tokens - len(first) + forest.cost_of(first)  # what the unit shares with the row stands there already
        if forest.num_tokens + added > max_row_tokens >= alone.num_tokens:
            close_row()  # torn apart, the unit would pay for its shared history twice
        for index in unit:
            if forest.num_tokens + forest.cost_of(items[index].token_ids) > max_row_tokens:
                close_row()
            forest.add(items[index].token_ids)
            members.append(index)
    close_row()
    return rows


def _units(items: Sequence[Item], max_row_tokens: int) -> list[list[int]]:
    """Indices of the scored items by unit, in order of first appearance: tokens without gradient are not paid for."""
    units: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if len(item.token_ids) > max_row_tokens:
            raise ValueError(
                f"a sequence of {len(item.token_ids)} tokens exceeds batching.max_row_tokens={max_row_tokens}; "
                "raise it or lower the prompt limit"
            )
        if item.scored:
            units.setdefault(item.unit, []).append(index)
    return list(units.values())


def _make_row(forest: _Forest, items: Sequence[Item], members: list[int]) -> Row:
    tokens, positions, segments = forest.lay_out()
    where_S: list[int] = []
    targets_S: list[int] = []
    owners_S: list[int] = []
    values: dict[str, list[float]] = {name: [] for name in items[members[0]].fields}
    claimed: set[int] = set()
    for index in members:
        item = items[index]
        assert min(item.scored) > 0, "the first token of a sequence has nothing that predicts it"
        assert {name: len(column) for name, column in item.fields.items()} == dict.fromkeys(values, len(item.scored))
        where = forest.locate(item.token_ids, claimed)
        where_S += [where[t - 1] for t in item.scored]
        targets_S += [item.token_ids[t] for t in item.scored]
        owners_S += [index] * len(item.scored)
        for name, column in item.fields.items():
            values[name] += column
    return Row(
        torch.tensor(tokens),
        torch.tensor(positions),
        torch.tensor(segments, dtype=torch.int32),
        torch.tensor(where_S, dtype=torch.long),
        torch.tensor(targets_S, dtype=torch.long),
        torch.tensor(owners_S, dtype=torch.long),
        {name: torch.tensor(column, dtype=torch.float32) for name, column in values.items()},
    )


def balance(costs: Iterable[float], ranks: int) -> list[list[int]]:
    """Deal row indices to data-parallel ranks: heaviest first to the lightest rank, never more than ceil(rows / ranks) each."""
    costs = list(costs)
    limit = -(-len(costs) // ranks)
    loads, dealt = [0.0] * ranks, [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < limit), key=lambda r: (loads[r], r))
        loads[rank] += costs[index]
        dealt[rank].append(index)
    return dealt
