"""Figures draw what the results say, in SVG that stands alone."""

import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure

from pivotrl.paper import figures


@pytest.fixture
def axes():
    return Figure().add_subplot()


def lines(axes):
    """(x, y) of the thick, labelled lines by label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_success_is_drawn_against_each_cost(outcome, axes):
    figures.success(axes, outcome.results, "turns")
    drawn = lines(axes)
    assert drawn["PivotRL"][0] == [1000, pytest.approx(0.2)] and drawn["PivotRL"][-1] == [1600, pytest.approx(0.8)]
    assert drawn["end-to-end RL"][-1] == [7200, pytest.approx(0.8)] and axes.get_xlim()[1] > 7200
    assert {text.get_text() for text in axes.texts} == {"pi_0", "SFT"}, "levels wear their names"


def test_lines_are_told_apart_without_colour():
    for names in (("pivotrl", "e2e"), ("pivotrl", "random", "strict", "keep_all_zero")):
        looks = [figures.LOOKS[name] for name in names]
        assert len({look["marker"] for look in looks}) == len({str(look["linestyle"]) for look in looks}) == len(names)


def test_deviations_are_means_over_seeds_as_far_as_all_go(outcome, axes):
    results = {"pivotrl": dict(outcome.results["pivotrl"]), "random": outcome.results["random"]}
    figures.deviations(axes, results, ["pivotrl", "random"])
    drawn = lines(axes)
    assert [y for _, y in drawn["PivotRL"]] == pytest.approx([0.4] * 6)
    assert [y for _, y in drawn["random turns, no selection"]] == pytest.approx([0.1] * 6)


def test_every_cell_has_a_row_with_all_seeds(outcome, axes):
    figures.dots(axes, outcome.results)
    assert [label.get_text() for label in axes.get_yticklabels()][3] == "PivotRL"
    dots = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert sorted(dots[3].get_xdata().tolist()) == [0.8, 0.8, 1.0] and [text.get_text() for text in axes.texts][3] == "86.7"


def test_files_are_whole_svg_and_the_same_each_time(outcome):
    drawn = figures.figures(outcome.results)
    assert list(drawn) == ["figure_1", "figure_3", "figure_4"] and len(drawn["figure_1"]) == 3
    text = figures.svg_file(drawn["figure_4"])
    assert ET.fromstring(text).tag.endswith("svg") and text == figures.svg_file(drawn["figure_4"])
    assert "PivotRL" in text and figures.INK not in text


def test_what_has_no_numbers_is_not_drawn(outcome):
    assert list(figures.figures({"base": outcome.results["base"]})) == ["figure_4"]
    assert list(figures.figures({"base": outcome.results["base"], "random": outcome.results["random"]})) == ["figure_3", "figure_4"]
