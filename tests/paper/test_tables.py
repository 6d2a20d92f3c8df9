"""Tables say what summary.json says, beside the paper's numbers with their marks."""

import copy

import pytest

from pivotrl.paper import tables
from pivotrl.paper.tables import points_spread, signed, with_error


def rows(table):
    return {row[0]: row[1:] for row in table.rows}


def test_every_row_fits_its_header(numbers):
    for table in [*tables.tables(numbers), tables.claims(numbers)]:
        assert table.rows and all(len(row) == len(table.header) for row in table.rows), table.name
        assert all(isinstance(cell, str) and cell for row in table.rows for cell in row), table.name


def test_in_domain(numbers):
    found = rows(tables.in_domain(numbers))
    assert found["PivotRL"][:3] == ("86.7 ± 11.5", "80.0, 100.0, 80.0", "+66.7 (se 21.1)") and found["PivotRL"][3:5] == (
        "100.0 ± 0.0",
        "63.81 (2nd)",
    )
    assert found["pi_0, before training"][2] == "–" and found["end-to-end RL"][3:] == ("–",) * 5
    assert "3 seeds, 5 tasks" in tables.in_domain(numbers).note


def test_out_of_domain_by_family_with_the_papers_mean(numbers):
    found = rows(tables.out_of_domain(numbers))
    assert len(found) == 12 and found["sort"] == ("51.0 ± 1.0", "\u221230.0 ± 0.0", "0.0 ± 0.0", "0.0 ± 0.0")
    assert found["paper: mean of 8 benchmarks"] == ("–", "\u22129.83 (2nd)", "–", "+0.21 (2nd)")


def test_equal_success(numbers):
    found = rows(tables.equal_success(numbers))
    assert found["rollout turns"][:3] == ("1,400", "7,200", "5.14x") and "133,000 against 542,000" in found["rollout turns"][3]
    assert found["rollout turns without profiling"][:3] == ("400", "7,200", "18.00x")
    without = copy.deepcopy(numbers)
    without["rollout_turns_at_equal_success"] = dict.fromkeys(numbers["rollout_turns_at_equal_success"]) | {"reason": "e2e never rises"}
    table = tables.equal_success(without)
    assert rows(table)["seconds"][:3] == ("–", "–", "–") and table.note.startswith("No such level: e2e never rises")


def test_ablations_are_measured_against_pivotrl(numbers):
    found = rows(tables.ablations(numbers))
    assert list(found) == ["PivotRL", "random turns, no selection"]
    assert found["PivotRL"][2] == "100.0 ± 0.0" and found["random turns, no selection"][2] == "–"
    assert found["random turns, no selection"][0] == "60.0 ± 0.0" and found["random turns, no selection"][-1] == "59.68 (2nd)"


def test_costs_tell_profiling_apart(numbers):
    assert rows(tables.costs(numbers))["PivotRL"] == ("1,600", "1,000", "15,000", "65", "50")


def test_a_comparison_without_base_or_with_one_seed_still_has_its_tables(numbers):
    less = copy.deepcopy(numbers)
    del less["methods"]["base"], less["methods"]["e2e"]
    less["methods"]["sft"]["task_success"] = [0.4, None, None]
    assert rows(tables.in_domain(less))["SFT on the expert's turns"][0] == "40.0"
    assert rows(tables.out_of_domain(less))["add"][0] == "–"


@pytest.mark.parametrize(("value", "text"), [(0.123, "+12.3"), (-0.0004, "0.0"), (-0.05, "\u22125.0"), (0.0, "0.0")])
def test_signs(value, text):
    assert signed(value) == text and with_error({"mean": value, "standard_error": None}) == text
    assert points_spread([value, None, value]) == f"{text} ± 0.0" and with_error(None) == "–"
