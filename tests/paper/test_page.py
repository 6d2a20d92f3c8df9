"""The report's documents: self-contained, escaped, and telling of every claim and cell."""

import re

import pytest

from pivotrl.paper import page, tables, write_report


@pytest.fixture(scope="module")
def documents(outcome, numbers):
    return page.documents(outcome.results, numbers)


def test_the_page_needs_nothing_else(documents):
    html = documents["paper.html"]
    links = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", html)
    assert not [link for link in links if not link.startswith("#")] and html.count("<svg") == 5
    assert "@import" not in html and "<script" not in html


def test_both_tell_every_number_and_claim(documents, numbers):
    html, markdown = (re.sub(r"\s+", " ", documents[name].replace("&#39;", "'")) for name in ("paper.html", "paper.md"))
    for table in [*tables.tables(numbers), tables.claims(numbers)]:
        for cell in (cell for row in table.rows for cell in row):
            assert cell in html and cell in markdown, cell
    assert "Not in this report: strict (seeds 0, 1, 2)." in html and "Not in this report: strict (seeds 0, 1, 2)." in markdown


def test_markdown_tables_are_whole_and_figures_lie_beside(documents):
    markdown = documents["paper.md"]
    for block in re.findall(r"(?:^\|.*\|\n)+", markdown, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert set(re.findall(r"\]\((\S+?)\)", markdown)) == documents.keys() - {"paper.html", "paper.md"}


def test_text_from_outside_is_escaped(outcome, numbers):
    spoiled = numbers | {"git": ["<b>&x"], "claims": [numbers["claims"][0] | {"sentence": "a < b"}]}
    html = page.documents(outcome.results, spoiled)["paper.html"]
    assert "a &lt; b" in html and "&lt;b&gt;&amp;x" in html and "<b>&x" not in html


def test_the_report_is_written(comparison_dir):
    path = write_report(comparison_dir)
    assert path == comparison_dir / "report" / "paper.html"
    names = {"paper.html", "paper.md", "summary.json", "figure_1.svg", "figure_3.svg", "figure_4.svg"}
    assert {file.name for file in path.parent.iterdir()} == names


def test_what_was_set_by_hand_is_told(numbers):
    assert "Set otherwise" not in page.lead(numbers)
    assert "Set otherwise: domain.warmup_overlooked=0.7." in page.lead(numbers | {"overrides": ["domain.warmup_overlooked=0.7"]})
