import json
import subprocess
from enum import StrEnum
from pathlib import Path

import pytest
import yaml

from pivotrl.config import OnChange
from pivotrl.preemption import Preempted
from pivotrl.run_folder import RunFolder

CONFIG = {"algorithm": {"lr": 1e-6, "num_steps": 10}, "seed": 0}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "candidates.jsonl"
    path.write_text("{}\n")
    return path


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "demo")


def _finish(run, source, config=CONFIG, **options):
    with run.stage("train", config, {"candidates": source}, **options) as stage:
        done = stage.done
        if not done:
            stage.count(steps=10)
    return done


def test_stage_records_what_it_was_made_from(run, source):
    with run.stage("train", CONFIG, {"candidates": source}) as stage:
        assert not stage.done
        assert run.manifest()["train"]["status"] == "running"
        stage.count(steps=10)
    entry = run.manifest()["train"]
    assert entry["status"] == "done" and entry["counts"] == {"steps": 10} and entry["seconds"] >= 0
    assert entry["finished"] >= entry["started"] and entry["started"].endswith("+00:00")
    assert len(entry["config_digest"]) == 64 and len(entry["inputs"]["candidates"]) == 64
    assert {"python", "torch", "megatron-core", "transformers"} <= entry["versions"].keys()
    assert yaml.safe_load((run.path / "configs" / "train.yaml").read_text()) == CONFIG
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG


def test_the_whole_config_is_kept_for_people(run, source):
    class Rule(StrEnum):
        mixed = "mixed"

    with run.stage("train", CONFIG, {}, resolved={"rule": Rule.mixed, "path": Path("a/b")}):
        pass
    assert yaml.safe_load((run.path / "configs" / "train.yaml").read_text()) == {"rule": "mixed", "path": "a/b"}


def test_git_revision_is_recorded_and_outside_git_it_is_none(run, source, monkeypatch):
    def fake(command, **options):
        return subprocess.CompletedProcess(command, 0, stdout="abc123\n" if "rev-parse" in command else " M file\n")

    monkeypatch.setattr(subprocess, "run", fake)
    _finish(run, source)
    assert run.manifest()["train"]["git"] == "abc123+dirty"

    def missing(command, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    with run.stage("other", CONFIG, {}):
        pass
    assert run.manifest()["other"]["git"] is None


def test_done_stage_is_skipped_and_stays_as_it_was(run, source):
    _finish(run, source)
    before = run.manifest_path.read_bytes()
    assert _finish(run, source)
    assert run.manifest_path.read_bytes() == before


def test_done_stage_whose_output_is_gone_runs_again(run, source):
    output = run.path / "pivots.jsonl"
    _finish(run, source, outputs=[output])
    assert not _finish(run, source, outputs=[output])
    output.touch()
    assert _finish(run, source, outputs=[output])


def test_failure_is_recorded_and_the_stage_goes_on_next_time(run, source):
    with pytest.raises(RuntimeError), run.stage("train", CONFIG, {"candidates": source}):
        raise RuntimeError("out of memory")
    entry = run.manifest()["train"]
    assert entry["status"] == "failed" and entry["error"] == "RuntimeError: out of memory"
    assert not _finish(run, source)
    assert run.manifest()["train"]["status"] == "done" and run.manifest()["train"]["error"] is None


def test_asked_to_leave_is_no_failure(run, source):
    with pytest.raises(SystemExit), run.stage("train", CONFIG, {"candidates": source}) as stage:
        stage.count(steps=3)
        raise Preempted("step 3 of 10 is saved")
    entry = run.manifest()["train"]
    assert entry["status"] == "preempted" and entry["error"] == "Preempted: step 3 of 10 is saved" and entry["finished"]
    with pytest.raises(ValueError, match="'train' has preempted output made from something else"):
        run.stage("train", CONFIG | {"seed": 1}, {"candidates": source})
    assert not _finish(run, source), "it goes on"
    assert run.manifest()["train"]["status"] == "done" and run.manifest()["train"]["error"] is None
    with pytest.raises(SystemExit), run.stage("other", CONFIG, {}):
        raise SystemExit(1)
    assert run.manifest()["other"]["status"] == "failed"


@pytest.mark.parametrize("finished", [True, False])
def test_changes_are_refused_by_name(run, source, finished):
    stage = run.stage("train", CONFIG, {"candidates": source})
    if finished:
        stage.__exit__(None, None, None)
    source.write_text("{}\n{}\n")
    changed = {"algorithm": {"lr": 2e-6, "num_steps": 10}, "seed": 0, "rule": "mixed"}
    before = run.manifest_path.read_bytes()
    with pytest.raises(ValueError) as caught:
        run.stage("train", changed, {"candidates": source})
    message = str(caught.value)
    assert "algorithm.lr: 1e-06 -> 2e-06" in message and "rule: (absent) -> mixed" in message and "input candidates" in message
    assert "num_steps" not in message and "seed" not in message
    assert "on_change=restart" in message and "run_name" in message
    assert run.manifest_path.read_bytes() == before


def test_restart_deletes_this_stages_outputs_only(run, source):
    _finish(run, source)
    folder, file, other = run.path / "checkpoints", run.path / "pivots.jsonl", run.path / "keep.txt"
    folder.mkdir()
    for path in (folder / "step_1", file, other):
        path.write_text("old")
    outputs = [folder, file, run.path / "never_written"]
    stage = run.stage("train", CONFIG | {"seed": 1}, {"candidates": source}, outputs=outputs, on_change=OnChange.restart)
    assert not stage.done and not folder.exists() and not file.exists() and other.exists()
    assert run.manifest()["train"]["config"]["seed"] == 1 and run.manifest()["train"]["counts"] == {}


@pytest.mark.parametrize("danger", ["input", "run"])
def test_restart_never_deletes_an_input_or_the_run(run, source, danger):
    _finish(run, source)
    output = source.parent if danger == "input" else run.path
    with pytest.raises(ValueError, match="would delete"):
        run.stage("train", {}, {"candidates": source}, outputs=[output], on_change=OnChange.restart)
    assert source.exists() and run.manifest_path.exists()


def test_accept_goes_on_and_says_so(run, source):
    run.stage("train", CONFIG, {"candidates": source})
    assert not _finish(run, source, CONFIG | {"seed": 1}, on_change=OnChange.accept)
    assert run.manifest()["train"]["accepted"] == ["seed: 0 -> 1"]
    assert _finish(run, source, CONFIG | {"seed": 1})
    assert _finish(run, source, CONFIG | {"seed": 2}, on_change=OnChange.accept), "finished output is taken as it is"


@pytest.mark.parametrize("text", ["", '{"stages": {"train"', '{"stages": []}', "{}"])
def test_damaged_manifest_is_named(run, source, text):
    run.path.mkdir(parents=True)
    run.manifest_path.write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged.*run_name"):
        run.stage("train", CONFIG, {"candidates": source})


def test_missing_input_is_named(run, source):
    with pytest.raises(ValueError, match="'train' needs candidates at .*nowhere"):
        run.stage("train", CONFIG, {"candidates": source.with_name("nowhere")})
    assert not run.path.exists()


def test_other_ranks_decide_alike_and_write_nothing(run, source):
    other = RunFolder(run.path, writes=False)
    with other.stage("train", CONFIG, {"candidates": source}) as stage:
        assert not stage.done
    assert not run.path.exists()
    _finish(run, source)
    files = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert _finish(other, source)
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        _finish(other, source, CONFIG | {"seed": 1})
    assert not _finish(other, source, CONFIG | {"seed": 1}, outputs=[run.path / "configs"], on_change=OnChange.restart)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == files


def test_stages_share_one_manifest(run, source):
    _finish(run, source)
    with run.stage("evaluate", {}, {}):
        pass
    assert list(json.loads(run.manifest_path.read_bytes())["stages"]) == ["train", "evaluate"]
