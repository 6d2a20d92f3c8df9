"""Lanes: order, failures, stopping and going on; and two cells for real, with the runner killed half-way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from pivotrl import preemption
from pivotrl.paper.cells import Comparison, Job, find_cells
from pivotrl.paper.processes import ROOT
from pivotrl.paper.runner import Board, Clock, Failure, Runner
from pivotrl.run_folder import RunFolder

# Stands in for every recipe: fails, hangs or writes a mark, as the folder's own files say.
RECIPE = """
import signal, sys, time
from pathlib import Path
options = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
run, stage = Path(options["run_dir"]), Path(sys.argv[0]).stem
run.mkdir(parents=True, exist_ok=True)
with open(run / "starts", "a") as starts:
    starts.write(f"{stage} {'rollout.urls' in options}\\n")
if (run / f"fail_{stage}").exists():
    sys.exit("no luck")
if (run / f"hang_{stage}").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    time.sleep(600)
(run / f"done_{stage}").touch()
"""


class Unserved:
    """A lane whose server nobody asks anything."""

    def __init__(self, index):
        self.index, self.closed, self.broken = index, False, False

    def start(self):
        pass

    def ready(self):
        if self.broken:
            raise RuntimeError("the rollout server ended")
        return True

    def override(self):
        return "rollout.urls=[nowhere]"

    def close(self):
        self.closed = True


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """runner(*cells): on the stand-in recipes, two lanes."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for path in (ROOT / "recipes").glob("*.py"):
        (recipes / path.name).write_text(RECIPE)
    monkeypatch.setattr("pivotrl.paper.runner.RECIPES_DIR", recipes)

    def is_done(self, stage, overrides):
        (run_dir,) = (text.removeprefix("run_dir=") for text in overrides if text.startswith("run_dir="))
        return os.path.exists(f"{run_dir}/done_{stage}")

    monkeypatch.setattr(Runner, "_is_done", is_done)

    def make(*names, seeds=(0, 1)):
        made = Runner(Comparison(tmp_path / "paper", "paper_smoke", seeds, find_cells(names)), lanes=2)
        made.servers = [Unserved(0), Unserved(1)]
        return made

    return make


def starts(runner, folder):
    path = runner.comparison.root / folder / "starts"
    return path.read_text().splitlines() if path.exists() else []


def test_everything_runs_once_and_never_again(runner, capsys):
    first = runner("base", "pivotrl", "random")
    assert first.run() and len(first.board.done) == len(first.board.jobs) == 1 + 2 * 4
    assert starts(first, "seed_1/profile_functional") == ["profile_candidates True"], "two cells share it"
    assert starts(first, "seed_0/random") == ["select_pivots False", "train_grpo True", "export_hf False", "evaluate True"]
    assert starts(first, "seed_0/random/greedy") == ["evaluate True"]
    assert all(server.closed for server in first.servers)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("[9/9]") and "ETA 00:00" in printed[-1] and len(printed) == 4 + 2 + 4 + 10 + 10
    again = runner("base", "pivotrl", "random")
    assert again.run() and starts(again, "seed_0/random") == starts(first, "seed_0/random")
    assert "already done" in capsys.readouterr().out


def test_a_failed_cell_stops_only_what_needs_it(runner):
    made = runner("pivotrl", "random", "k8", seeds=(0,))
    folder = made.comparison.root / "seed_0" / "profile_functional"
    folder.mkdir(parents=True)
    (folder / "fail_profile_candidates").touch()
    assert not made.run()
    failures = {failure.job: failure for failure in made.board.failures}
    assert failures.keys() == {"seed_0/profile_functional", "seed_0/pivotrl", "seed_0/random"} and "seed_0/k8" in made.board.done
    assert "exit code 1" in failures["seed_0/profile_functional"].reason and "no luck" in failures["seed_0/random"].log.read_text()
    assert failures["seed_0/random"].reason == "not begun: it needs seed_0/profile_functional"
    (folder / "fail_profile_candidates").unlink()
    assert runner("pivotrl", "random", "k8", seeds=(0,)).run()


def test_a_server_that_does_not_start_fails_its_jobs(runner):
    made = runner("base", seeds=(0, 1))
    for server in made.servers:
        server.broken = True
    assert not made.run() and [failure.reason for failure in made.board.failures] == ["evaluate: the rollout server ended"] * 2


def test_a_folder_belongs_to_one_experiment_and_remembers_its_cells(runner):
    assert runner("base", seeds=(0,)).run() and runner("base", "sft", seeds=(1,)).run()
    described = json.loads((runner().comparison.root / "paper.json").read_text())
    assert described == {"experiment": "paper_smoke", "overrides": [], "cells": {"base": [0, 1], "sft": [1]}}
    other = runner("base")
    other.comparison = dataclasses.replace(other.comparison, experiment="paper")
    with pytest.raises(ValueError, match="experiment paper_smoke -> paper.*give another --folder"):
        other.run()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_and_the_next_start_goes_on(runner, number):
    made = runner("base", "pivotrl", seeds=(0,))
    folder = made.comparison.root / "seed_0" / "base"
    folder.mkdir(parents=True)
    (folder / "hang_evaluate").touch()

    def interrupt():
        while not starts(made, "seed_0/base"):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=interrupt)
    sender.start()
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        made.run()
    sender.join()
    assert left.value.code == preemption.SAVED and signal.getsignal(number) == before and not made.board.failures
    assert all(server.closed for server in made.servers) and "base" in made.board.done and "seed_0/base" not in made.board.done
    (folder / "hang_evaluate").unlink()
    assert runner("base", "pivotrl", seeds=(0,)).run()


def test_a_fault_in_one_lane_ends_the_others(runner, monkeypatch):
    def broken(self, stage, overrides):
        raise ZeroDivisionError

    monkeypatch.setattr(Runner, "_is_done", broken)
    with pytest.raises(ZeroDivisionError):
        runner("base").run()


def test_mistakes_are_found_before_anything_starts(runner, tmp_path):
    from omegaconf.errors import OmegaConfBaseException

    made = runner("base")
    made.comparison = Comparison(tmp_path / "paper", "paper_smoke", (0,), overrides=("+rollout.typo=1",))
    with pytest.raises(OmegaConfBaseException, match="typo"):
        made.run()
    assert not (tmp_path / "paper").exists()
    with pytest.raises(ValueError, match="--lanes 0"):
        Runner(made.comparison, lanes=0)


def test_the_board_hands_jobs_out_by_need():
    jobs = [Job("base", ()), Job("a", (), ("base",)), Job("b", (), ("a",)), Job("c", (), ("base",))]
    board = Board(jobs)
    assert board.take() is jobs[0]
    board.put(jobs[0], None)
    assert board.take() is jobs[1] and board.take() is jobs[3], "b must wait for a"
    board.put(jobs[1], Failure("a", "broken", ROOT))
    board.put(jobs[3], None)
    assert board.take() is None and [failure.job for failure in board.failures] == ["a", "b"]


def test_the_clock_tells_the_rest_from_the_same_stage_of_the_same_kind():
    jobs = [Job(f"seed_{seed}/{kind}", (("train", ()), ("evaluate", ()))) for kind in ("x", "y") for seed in (0, 1)]
    clock = Clock(jobs, lanes=2)
    assert clock.left() is None
    clock.finished(jobs[0], "train", 100.0)
    clock.finished(jobs[2], "train", 10.0)
    clock.finished(jobs[0], "evaluate", 4.0)
    assert clock.left() == pytest.approx((100 + 4 + 10 + 4 + 4) / 2), "evaluations of y are taken to last as long as those of x"
    clock.finished(jobs[1], "train", None)
    assert clock.left() == pytest.approx((4 + 10 + 4 + 4) / 2)


def test_the_clock_counts_a_stage_that_a_job_has_twice():
    job = Job("seed_0/x", (("evaluate", ()), ("evaluate", ("evaluation.temperature=0.0",))))
    clock = Clock([job], lanes=1)
    clock.finished(job, "evaluate", 4.0)
    assert clock.left() == pytest.approx(4.0)
    clock.finished(job, "evaluate", 6.0)
    assert clock.left() == 0.0


def paper(folder, *arguments):
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "paper.py"), "--folder", str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def test_a_users_mistake_is_one_sentence(tmp_path):
    process = paper(tmp_path, "--only", "pivotlr")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and output.startswith("paper: there is no cell pivotlr; known: base") and output.count("\n") == 1


@pytest.mark.timeout(1800)
def test_two_cells_for_real_with_the_runner_killed_half_way(tmp_path):
    arguments = ("--smoke", "--only", "base", "sft", "--seeds", "0", "--lanes", "1")
    arguments += (
        "--override",
        "sft.num_steps=8",
        "evaluation.skill_examples=1",
        "evaluation.max_tasks=1",
        "evaluation.max_pivot_candidates=2",
    )
    process = paper(tmp_path, *arguments)
    try:
        assert any(line.startswith("[1/3] base train_sft:") for line in process.stdout), "both halves of the warm-up are done"
        while not (tmp_path / "logs" / "server_0.log").exists():
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process = paper(tmp_path, *arguments)
        output, _ = process.communicate(timeout=1500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert "base train_sft: already done" in output and "3 of 3 jobs are done" in output
    for name in ("base", "sft"):
        assert RunFolder(tmp_path / "seed_0" / name).manifest()["evaluate"]["status"] == "done"
    assert (tmp_path / "report" / "paper.html").exists() and not list(tmp_path.glob("servers/*/*.url")), "no server is left"
