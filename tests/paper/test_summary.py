"""summary.json has every cell, seed and cost of a folder whose numbers are known."""

import json
import shutil

import pytest

from pivotrl.paper import write_report
from pivotrl.paper.cells import Folders
from pivotrl.paper.summary import read, summarise


def test_the_promised_fields_are_there(numbers):
    for name, method in numbers["methods"].items():
        assert {"task_success", "out_of_domain_change", "rollout_turns", "rollout_tokens", "wall_s", "profiling_turns"} <= method.keys(), (
            name
        )
        assert len(method["task_success"]) == len(method["out_of_domain_change"]) == 3
    assert {"pivotrl", "e2e", "ratio", "wall_ratio"} <= numbers["rollout_turns_at_equal_success"].keys()
    assert (numbers["date"], numbers["git"]) == ("2026-01-02", ["0123456789abcdef"])
    assert (numbers["seeds"], numbers["held_out_tasks"]) == ([0, 1, 2], 5)


def test_values_by_hand(numbers):
    pivotrl = numbers["methods"]["pivotrl"]
    assert pivotrl["task_success"] == [0.8, 1.0, 0.8] and pivotrl["task_success_change"] == pytest.approx([0.6, 0.8, 0.6])
    assert pivotrl["task_success_mean"] == {"mean": pytest.approx(2.6 / 3), "sd": pytest.approx((0.04 / 3) ** 0.5)}
    assert (pivotrl["rollout_turns"], pivotrl["profiling_turns"], pivotrl["wall_s"], pivotrl["profiling_wall_s"]) == (1600, 1000, 65, 50)
    assert pivotrl["per_seed"]["rollout_tokens"] == [15_000] * 3 and pivotrl["pivots"] == [7, 7, 7]
    assert pivotrl["greedy"]["task_success"] == [1.0] * 3 and numbers["methods"]["e2e"]["greedy"]["task_success"] == [None] * 3
    assert numbers["differences_greedy"]["pivotrl - sft"]["mean"] == pytest.approx(0.4)
    assert numbers["differences_greedy"]["pivotrl - e2e"] is None
    sft = numbers["methods"]["sft"]
    assert sft["out_of_domain_change"] == pytest.approx([-0.3] * 3) and sft["skills_change"]["sort"] == pytest.approx([-0.3] * 3)
    assert numbers["methods"]["base"]["out_of_domain_change"] == [0, 0, 0] and sft["profiling_turns"] == 0
    assert numbers["differences"]["pivotrl - sft"]["mean"] == pytest.approx((0.4 + 0.6 + 0.4) / 3)


def test_turns_at_equal_success_by_hand(numbers):
    """Both reach 0.8: end-to-end RL at its third point (7200), PivotRL at its second (1000 profiling + 400)."""
    found = numbers["rollout_turns_at_equal_success"]
    assert [found[name] for name in ("level", "pivotrl", "e2e", "ratio")] == pytest.approx([0.8, 1400, 7200, 7200 / 1400])
    assert (found["pivotrl_wall_s"], found["e2e_wall_s"]) == (61, 15)


def test_sizes_are_the_configured_ones(numbers):
    assert numbers["sizes"]["model"]["num_layers"] == 2 and numbers["sizes"]["only e2e"]["e2e.tasks_per_step"] == 2
    assert numbers["sizes"]["only careless"]["domain.warmup_overlooked"] == 0.3 and numbers["sizes"]["domain"]["warmup_overlooked"] == 0.0
    assert numbers["sizes"]["only sft"]["sft.num_steps"] == 5 and numbers["sizes"]["sft"]["num_steps"] == 90


def test_missing_cells_are_null_and_named(comparison_dir):
    shutil.rmtree(Folders(comparison_dir).cell("sft", 1))
    shutil.rmtree(Folders(comparison_dir).cell("base", 2))
    numbers = summarise(read(comparison_dir))
    assert numbers["missing"] == {"base": [2], "sft": [1], "strict": [0, 1, 2]}, "what was never asked for is not missing"
    sft = numbers["methods"]["sft"]
    assert sft["task_success"] == [0.4, None, 0.4] and sft["out_of_domain_change"][1:] == [None, None] and sft["wall_s"] == 20
    assert json.loads(json.dumps(numbers)) == numbers


def test_no_comparison_is_a_sentence(tmp_path, comparison_dir):
    with pytest.raises(ValueError, match="holds no comparison"):
        write_report(tmp_path)
    for seed in (0, 1, 2):
        shutil.rmtree(comparison_dir / f"seed_{seed}")
    with pytest.raises(ValueError, match="no cell in .* is finished yet"):
        write_report(comparison_dir)
