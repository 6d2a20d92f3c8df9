"""The page: complete, self-contained, escaped, and made of whatever a run has."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pivotrl import report
from pivotrl.records import write_json
from pivotrl.report import html
from pivotrl.report.summary import read_run, summary


class Tags(HTMLParser):
    """Collects what a page would fetch, and whether its elements are closed in order."""

    VOID = {"meta", "br", "wbr", "path", "use", "rect", "circle", "line"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def text_of(page: str) -> str:
    page = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; tests of the text can do without."""
    monkeypatch.setattr(html, "charts", lambda run: [])


def test_written_files_agree(run_dir: Path, no_charts: None) -> None:
    path = report.write(run_dir)
    assert path == run_dir / "report" / "report.html"
    assert json.loads((run_dir / "report" / "summary.json").read_text()) == summary(run_dir)


def test_page_is_self_contained_and_well_formed(run_dir: Path) -> None:
    tags = Tags()
    tags.feed(report.write(run_dir).read_text())
    assert tags.open == []
    assert all(value.startswith("#") for value in tags.fetched)


def test_page_says_the_numbers(run_dir: Path, no_charts: None) -> None:
    (run_dir / "command.txt").write_text("python recipes/run_pipeline.py experiment=demo\n")
    text = text_of(report.write(run_dir).read_text())
    assert "Task success 25.0 % → 75.0 % +50.0" in text and "(4 tasks)" in text
    assert "1 of 3 profiled turns became pivots" in text
    assert "kept as pivots 1 33.3 %" in text and "always right 2 66.7 %" in text
    assert "sort 60.0 % 60.0 % 0.0" in text
    assert "done 25.0 % 75.0 % +50.0" in text and "max turns 25.0 % 25.0 % 0.0" in text
    assert "git checkout 0123456789abcdef" in text and "run_pipeline.py experiment=demo run_name=demo_again" in text
    assert "torch 2.13.0" in text and "fedcba987654" in text


def test_all_charts_are_there_and_use_the_page_text_colour(run_dir: Path) -> None:
    found = {chart["title"]: chart["svg"] for chart in html.charts(read_run(run_dir))}
    assert len(found) == 9 and {"Reward", "Mean reward of profiled turns", "Trainer against rollout engine", "Supervised warm-up"} <= set(
        found
    )
    assert all("currentColor" in svg and html.INK not in svg and svg.startswith("<svg") for svg in found.values())


def test_a_run_that_sampled_ahead_shows_how_far(ahead_dir: Path) -> None:
    found = {chart["title"]: chart for chart in html.charts(read_run(ahead_dir))}
    svg = found["Staleness"]["svg"]
    assert "0: 50.0 %" in svg and "1: 50.0 %" in svg
    assert "on a few probes" in found["Trainer against rollout engine"]["note"] and "hidden" in found["Seconds per step"]["note"]
    assert "engine check" in found["Seconds per step"]["svg"]


def test_no_staleness_no_chart(run_dir: Path, ahead_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    write = [{**row, "staleness_max": min(0, row["staleness_max"])} for row in rows]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in write))
    assert "Staleness" not in {chart["title"] for chart in html.charts(read_run(run_dir))}


def test_example_pivot_counts_samples_before_and_in_training(run_dir: Path) -> None:
    (example,) = html.examples(read_run(run_dir))
    assert (example["kind"], example["expert"], example["step"]) == ("toggle_roaming", "toggle_roaming(on=True)", 2)
    assert (example["mean_before"], example["mean_after"], example["earlier"]) == (0.5, 0.75, 1)
    assert [(row["text"], row["before"], row["after"], row["reward"]) for row in example["samples"]] == [
        ("right", 2, 3, 1.0),
        ("wrong", 2, 1, 0.0),
    ]


def test_what_a_model_wrote_is_escaped(run_dir: Path, no_charts: None) -> None:
    profiles = run_dir / "profiles" / "profiles.jsonl"
    profiles.write_text(profiles.read_text().replace("no change", "<script>alert(1)</script>"))
    page = report.write(run_dir).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("missing", ["metrics.jsonl", "profiles/profiles.jsonl", "pivots/pivots.jsonl", "evaluation/after/result.json"])
def test_a_page_without_one_part(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    assert text_of(report.write(run_dir).read_text()).startswith("demo")


def test_a_page_of_a_failed_run(tmp_path: Path, run_dir: Path) -> None:
    entry = json.loads((run_dir / "manifest.json").read_text())["stages"]["train_sft"]
    write_json(
        tmp_path / "failed" / "manifest.json", {"stages": {"train_sft": entry | {"status": "failed", "error": "ValueError: <no> data"}}}
    )
    text = text_of(report.write(tmp_path / "failed").read_text())
    assert "train_sft: failed" in text and "&lt;no&gt; data" in text and "Curves" not in text


def test_policies_under_other_labels_get_columns(run_dir: Path, no_charts: None) -> None:
    (run_dir / "evaluation" / "before").rename(run_dir / "evaluation" / "sft")
    text = text_of(report.write(run_dir).read_text())
    assert (
        "skill after sft" in text
        and "change" not in text.partition("Unrelated skills")[2].partition("Episode ends")[0].partition("skill after")[2]
    )


def test_numbers_as_people_write_them() -> None:
    assert [html.number(x) for x in (None, 0, 3, 5120, 0.3333, 1.5e-7, 123.4)] == ["–", "0", "3", "5,120", "0.333", "1.5e-07", "123"]
    assert [html.duration(x) for x in (None, 1.04, 368.6, 7325)] == ["–", "1.0 s", "6 min 9 s", "2 h 2 min"]
    assert [html.signed(x) for x in (None, 0.0, 1.25, -3.0)] == ["–", "0.0", "+1.2", "−3.0"]
    assert html.points(0.5, None) is None and html.points(0.5, 0.625) == 12.5
