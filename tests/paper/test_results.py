"""Costs and curves of a cell, from its folder alone."""

import json

import pytest

from pivotrl.paper.cells import Folders, find_cells
from pivotrl.paper.results import read_all, read_cell
from pivotrl.records import write_json


def read(root, name, seed=0):
    return read_cell(Folders(root), find_cells([name])[0], seed)


def test_every_cell_pays_for_its_profile_in_full(comparison_dir):
    pivotrl, random = read(comparison_dir, "pivotrl"), read(comparison_dir, "random")
    assert pivotrl.profiling == random.profiling and pivotrl.profiling.turns == 1000, "dropped samples were sampled too"
    assert pivotrl.cost.turns == 1000 + 6 * 100 and pivotrl.cost.tokens == 9000 + 6 * 1000
    assert read(comparison_dir, "e2e").cost.turns == 7200 and read(comparison_dir, "sft").cost.turns == 0


def test_seconds_leave_held_out_evaluation_out(comparison_dir):
    assert read(comparison_dir, "pivotrl").cost.wall_s == pytest.approx(50 + 3 + 12)
    assert read(comparison_dir, "e2e").cost.wall_s == pytest.approx(3 + 12)
    assert read(comparison_dir, "sft").cost.wall_s == 20 and read(comparison_dir, "base").cost.wall_s == 0


def test_a_curve_begins_at_pi_0_behind_profiling(comparison_dir):
    curve = read(comparison_dir, "pivotrl").curve
    assert [(point.step, point.success) for point in curve] == [(0, 0.2), (2, 0.6), (4, 0.8), (6, 0.8)]
    assert [point.cost.turns for point in curve] == [1000, 1200, 1400, 1600]
    assert [point.cost.wall_s for point in curve] == pytest.approx([53, 57, 61, 65]), "phases within phases must not count twice"
    assert [point.cost.turns for point in read(comparison_dir, "e2e").curve] == [0, 2400, 4800, 7200]
    assert read(comparison_dir, "random").curve == ()


def test_a_step_that_was_evaluated_twice_counts_once(comparison_dir):
    """A resumed run repeats a step; the newer evaluation stands."""
    path = Folders(comparison_dir).cell("e2e", 0) / "metrics.jsonl"
    again = {"stage": "train_e2e", "step": 1, "time": 2.0, "event": "evaluation", "task_success": 0.6}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    assert [point.success for point in read(comparison_dir, "e2e").curve] == [0.2, 0.6, 0.6, 0.8]


def test_profiling_anew_during_training_is_charged(comparison_dir):
    path = Folders(comparison_dir).cell("pivotrl", 0) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    row = next(line for line in lines if line["step"] == 3 and "event" not in line)
    row |= {"profiling_turns": 500, "profiling_tokens": 4000, "refreshed_pivots": 5}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = read(comparison_dir, "pivotrl")
    assert result.cost.turns == 2100 and result.profiling.turns == 1500 and result.counts["refreshes"] == 1
    assert [point.cost.turns for point in result.curve] == [1000, 1200, 1900, 2100]


def test_unfinished_cells_are_left_out_and_damaged_ones_named(comparison_dir):
    manifest = Folders(comparison_dir).cell("sft", 1) / "manifest.json"
    stages = json.loads(manifest.read_text())["stages"]
    stages["evaluate"]["status"] = "running"
    write_json(manifest, {"stages": stages})
    found = read_all(comparison_dir, (0, 1, 2))
    assert list(found) == ["base", "sft", "e2e", "pivotrl", "random"] and sorted(found["sft"]) == [0, 2]
    (Folders(comparison_dir).cell("base", 0) / "evaluation" / "sft" / "result.json").unlink()
    with pytest.raises(ValueError, match="one final evaluation, but has 0"):
        read_all(comparison_dir, (0, 1, 2))
