"""Packing: whatever the items share, every scored entry must predict its own token from exactly its own history."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pivotrl.batching import MIN_SHARED, Item, Row, balance, pack


def item_of(token_ids, start: int, unit: str = "") -> Item:
    """Scored from `start` on; the field tells the position in the sequence."""
    scored = range(start, len(token_ids))
    return Item(token_ids, scored, unit=unit, fields={"t": list(scored)})


def path(row: Row, position: int) -> list[int]:
    """Row indices of the tokens that the token at `position` attends to, itself included: its segment and all ancestors."""
    segments = row.segments_N3.tolist()
    index = next(i for i, (start, end, _) in enumerate(segments) if start <= position < end)
    found, stop = [], position + 1
    while index >= 0:
        start, end, parent = segments[index]
        assert parent < index, "parents come before their children"
        found = [*range(start, min(stop, end)), *found]
        index, stop = parent, end if parent < 0 else segments[parent][1]
    return found


def check_rows(items: list[Item], rows: list[Row], max_row_tokens: int) -> None:
    entries = []
    for row in rows:
        assert 0 < len(row.token_ids_T) == len(row.position_ids_T) <= max_row_tokens
        bounds = row.segments_N3[:, :2].flatten().tolist()
        assert bounds == [0, *[end for end in bounds[1:-1:2] for _ in range(2)], len(row.token_ids_T)], "segments tile the row"
        assert len(row.positions_S) == len(row.targets_S) == len(row.owners_S)
        assert row.cost >= len(row.token_ids_T)
        times = row.fields["t"].int().tolist() if row.fields else []
        for position, target, owner, t in zip(row.positions_S.tolist(), row.targets_S.tolist(), row.owners_S.tolist(), times, strict=True):
            seen = path(row, position)
            assert row.token_ids_T[seen].tolist() == list(items[owner].token_ids[:t])
            assert row.position_ids_T[seen].tolist() == list(range(t))
            assert target == items[owner].token_ids[t]
            entries.append((owner, t))
    assert sorted(entries) == sorted((i, t) for i, item in enumerate(items) for t in item.scored), "each entry once"


TOKENS = st.lists(st.integers(0, 2), max_size=3 * MIN_SHARED)


@st.composite
def item_lists(draw) -> list[Item]:
    """Sequences that branch off, extend or repeat a few trunks, around MIN_SHARED and far from it."""
    trunks = draw(st.lists(TOKENS, min_size=1, max_size=3))
    items: list[Item] = []
    for _ in range(draw(st.integers(1, 12))):
        trunk = draw(st.sampled_from(trunks))
        tokens = trunk[: draw(st.integers(0, len(trunk)))] + draw(TOKENS.map(lambda tail: tail[:20]))
        tokens = tokens or [0]
        if draw(st.booleans()):
            trunks.append(tokens)  # later sequences may grow from this one
        scored = sorted(draw(st.sets(st.integers(1, len(tokens) - 1)))) if len(tokens) > 1 else []
        fields = {"t": [float(t) for t in scored]} if scored or draw(st.booleans()) else {}
        items.append(Item(draw(st.sampled_from([tokens, tuple(tokens)])), scored, unit=draw(st.sampled_from("abc")), fields=fields))
    return items


@settings(max_examples=300, deadline=None)
@given(item_lists(), st.booleans(), st.sampled_from([0, 20, 100, 10_000]))
def test_every_entry_predicts_its_token_from_its_own_history(items, shared, spare):
    limit = max(len(item.token_ids) for item in items) + spare
    rows = pack(items, max_row_tokens=limit, shared_prefix=shared)
    check_rows(items, rows, limit)
    total = sum(len(row.token_ids_T) for row in rows)
    dense = sum(len(item.token_ids) for item in items if item.scored)
    assert total <= dense if shared else total == dense


@pytest.mark.parametrize("shared", [True, False])
def test_a_group_costs_its_history_once(shared):
    history, group = list(range(100, 140)), [[g, *range(9)] for g in range(8)]
    items = [item_of(history + action, len(history), unit="pivot") for action in group]
    (row,) = pack(items, max_row_tokens=1000, shared_prefix=shared)
    assert len(row.token_ids_T) == (40 + 8 * 10 if shared else 8 * (40 + 10))
    assert row.segments_N3.tolist()[:2] == ([[0, 40, -1], [40, 50, 0]] if shared else [[0, 50, -1], [50, 100, -1]])
    assert (row.segments_N3[1:, 2] == (0 if shared else -1)).all()
    check_rows(items, [row], 1000)


def test_turns_of_one_trajectory_cost_the_longest_and_equal_actions_coincide():
    trajectory = list(range(90))
    turns = [item_of(trajectory[:end], end - 10, unit="trajectory") for end in (30, 60, 90)]
    (row,) = pack(turns, max_row_tokens=1000, shared_prefix=True)
    assert row.segments_N3.tolist() == [[0, 90, -1]]
    (row,) = pack([turns[1]] * 4, max_row_tokens=1000, shared_prefix=True)
    assert len(row.token_ids_T) == 60 and row.owners_S.bincount().tolist() == [10] * 4


def test_without_sharing_equal_sequences_stand_side_by_side():
    (row,) = pack([item_of(range(20), 15)] * 3, max_row_tokens=60, shared_prefix=False)
    assert row.positions_S.tolist() == [*range(14, 19), *range(34, 39), *range(54, 59)]


def test_a_short_common_prefix_is_repeated():
    for length, tokens in ((MIN_SHARED - 1, 2 * (MIN_SHARED - 1) + 10), (MIN_SHARED, MIN_SHARED + 10)):
        items = [item_of([0] * length + [g] * 5, length) for g in (1, 2)]
        (row,) = pack(items, max_row_tokens=1000, shared_prefix=True)
        assert len(row.token_ids_T) == tokens


def test_a_unit_that_fits_into_a_row_is_not_torn_apart():
    units = {name: [item_of([k] * 30 + [g] * 5, 30, unit=name) for g in range(100, 104)] for k, name in enumerate("abc")}
    items = [units[name][g] for g in range(4) for name in "abc"]  # interleaved: order of arrival must not matter
    rows = pack(items, max_row_tokens=70, shared_prefix=True)
    assert [len(row.token_ids_T) for row in rows] == [30 + 4 * 5] * 3
    check_rows(items, rows, 70)
    assert [len(row.token_ids_T) for row in pack(items, max_row_tokens=45, shared_prefix=True)] == [45, 35] * 3


def test_units_that_share_a_history_fill_one_row():
    system = [7] * 50
    items = [item_of([*system, *[k] * 20, *[g] * 5], 70, unit=str(k)) for k in range(3) for g in range(10, 12)]
    (row,) = pack(items, max_row_tokens=50 + 3 * (20 + 2 * 5), shared_prefix=True)
    check_rows(items, [row], 140)


def test_units_start_a_fresh_row_when_only_a_part_would_fit():
    items = [item_of([1] * 40, 20, unit="a"), item_of([2] * 40 + [3] * 10, 20, unit="b"), item_of([2] * 40 + [4] * 10, 20, unit="b")]
    rows = pack(items, max_row_tokens=90, shared_prefix=True)
    assert [len(row.token_ids_T) for row in rows] == [40, 60]


def test_no_items_make_no_rows():
    assert pack([], max_row_tokens=10, shared_prefix=True) == []


@pytest.mark.parametrize("shared", [True, False])
def test_a_sequence_longer_than_a_row_is_refused(shared):
    pack([item_of([1] * 10, 5)], max_row_tokens=10, shared_prefix=shared)
    with pytest.raises(ValueError, match="11 tokens exceeds batching.max_row_tokens=10"):
        pack([item_of([1] * 10, 5), item_of([1] * 11, 5)], max_row_tokens=10, shared_prefix=shared)


def test_entries_that_nothing_predicts_or_without_their_numbers_are_refused():
    with pytest.raises(AssertionError, match="first token"):
        pack([Item([1, 2], [0], fields={"t": [0.0]})], max_row_tokens=10, shared_prefix=True)
    with pytest.raises(AssertionError):
        pack([Item([1, 2, 3], [1, 2], fields={"t": [0.0]})], max_row_tokens=10, shared_prefix=True)


def test_cost_counts_tokens_and_attention_pairs():
    (row,) = pack([item_of([0] * 100, 50)], max_row_tokens=100, shared_prefix=True)
    assert row.cost == pytest.approx(100 + 100 * 50 / 8192)
    items = [item_of([0] * 100 + [g] * 10, 100) for g in (1, 2)]
    (row,) = pack(items, max_row_tokens=1000, shared_prefix=True)
    assert row.cost == pytest.approx(120 + (100 * 50 + 2 * 10 * 105) / 8192)


def test_rows_hold_the_types_that_a_model_wants():
    (row,) = pack([item_of([0] * 4, 2)], max_row_tokens=100, shared_prefix=True)
    assert [t.dtype for t in (row.token_ids_T, row.positions_S, row.targets_S, row.owners_S)] == [torch.int64] * 4
    assert row.segments_N3.dtype == torch.int32 and row.fields["t"].dtype == torch.float32


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 9))
def test_balance_deals_every_row_once_and_evenly(costs, ranks):
    dealt = balance(costs, ranks)
    assert dealt == balance(iter(costs), ranks)
    assert len(dealt) == ranks and sorted(index for share in dealt for index in share) == list(range(len(costs)))
    assert all(len(share) <= math.ceil(len(costs) / ranks) for share in dealt)


def test_balance_evens_out_the_costs():
    assert balance([1, 9, 5, 5], 2) == [[1, 0], [2, 3]]
    assert balance([], 2) == [[], []]
