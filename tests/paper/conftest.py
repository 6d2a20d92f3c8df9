"""A comparison's folder made by hand, whose every number is known."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pivotrl.evaluation.skills import FAMILIES
from pivotrl.paper import summary
from pivotrl.paper.cells import CELLS, Folders
from pivotrl.records import write_json, write_jsonl
from pivotrl.types import Episode

TASKS = ("a", "b", "c", "d", "e")
SEEDS = (0, 1, 2)
PROFILE_TURNS, PROFILE_TOKENS, PROFILE_S = 1000, 9000, 50.0
SUCCESS = {"base": (1, 1, 1), "sft": (2, 2, 2), "e2e": (4, 4, 4), "pivotrl": (4, 5, 4), "random": (3, 3, 3)}  # of five tasks
SKILLS = {"base": 0.5, "sft": 0.2, "e2e": 0.5, "pivotrl": 0.5, "random": 0.45}
GREEDY = {"base": 2, "sft": 3, "pivotrl": 5}  # of five tasks, without sampling; the others were not evaluated so
CURVES = {"e2e": (2, 3, 4), "pivotrl": (3, 4, 4)}  # tasks solved after steps 2, 4, 6, for every seed


def entry(seconds: float, **counts: Any) -> dict[str, Any]:
    """A finished stage in a manifest."""
    return {
        "status": "done", "started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T04:04:05+00:00", "seconds": seconds,
        "error": None, "git": "0123456789abcdef", "versions": {}, "config_digest": "", "config": {}, "inputs": {}, "counts": counts,
    }  # fmt: skip


def write_evaluation(run: Path, label: str, solved: int, skill: float, seed: int) -> None:
    episodes = [Episode(task_id=task, reward=float(i < solved), turns=3, end="done") for i, task in enumerate(TASKS)]
    write_jsonl(run / "evaluation" / label / "episodes.jsonl", episodes)
    skills = {family: skill + 0.01 * seed for family in FAMILIES}
    result = {"task_success": solved / len(TASKS), "tasks": len(TASKS), "pivot_reward": 0.9}
    write_json(run / "evaluation" / label / "result.json", {**result, "out_of_domain": skill + 0.01 * seed, "skills": skills})


def write_training(run: Path, stage: str, *, turns: int, curve: Sequence[int] = (), std: float = 0.4) -> float:
    """Six steps of 2 s (and an evaluation of 100 s after every second one); returns the stage's seconds, start (3 s) included."""
    rows: list[dict[str, Any]] = []
    for step in range(6):
        measured = bool(curve) and step % 2 == 1
        if measured:
            rows.append({"stage": stage, "step": step, "time": 1.0, "event": "evaluation", "task_success": curve[step // 2] / len(TASKS)})
        row = {"stage": stage, "step": step, "time": 1.0, "reward_std": std, "rollout_turns": turns, "rollout_tokens": 10 * turns}
        row |= {"rollout_s": 1.0, "update_s": 0.75, "forward_backward_s": 0.5, "environment_s": 0.5, "weight_sync_s": 0.25}
        rows.append(row | {"train_tokens_per_s": 9e9, "rollout_tokens_per_s": 9e9} | ({"evaluation_s": 100.0} if measured else {}))
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 3.0 + 12.0 + (300.0 if curve else 0.0)


def write_cell(root: Path, name: str, seed: int, *, solved: int, skill: float, curve: Sequence[int] = ()) -> None:
    folders, cell = Folders(root), next(cell for cell in CELLS if cell.name == name)
    run = folders.cell(name, seed)
    stages = {"evaluate": entry(9.0)}
    if cell.train == "train_sft":
        stages["train_sft"] = entry(20.0)
    elif cell.train:
        turns = 1200 if name == "e2e" else 100
        stages[cell.train] = entry(write_training(run, cell.train, turns=turns, curve=curve, std=0.1 if name == "random" else 0.4))
    if cell.profile:
        counts = {"samples": PROFILE_TURNS - 10, "dropped_samples": 10, "rollout_tokens": PROFILE_TOKENS, "dead_turn_share": 0.7}
        write_json(folders.profile(cell.profile, seed) / "manifest.json", {"stages": {"profile_candidates": entry(PROFILE_S, **counts)}})
        (run / "pivots").mkdir(parents=True)
        (run / "pivots" / "pivots.jsonl").write_text("{}\n" * 7)
    write_json(run / "manifest.json", {"stages": stages})
    label = "sft" if cell.train in (None, "train_sft") else "final"
    write_evaluation(run, label, solved, skill, seed)
    if name in GREEDY:
        write_json(folders.greedy(name, seed) / "manifest.json", {"stages": {"evaluate": entry(8.0)}})
        write_evaluation(folders.greedy(name, seed), label, GREEDY[name], skill, seed)


def write_comparison(root: Path) -> Path:
    described = {"experiment": "paper_smoke", "overrides": [], "cells": dict.fromkeys((*SUCCESS, "strict"), SEEDS)}
    write_json(root / "paper.json", described)
    for name, solved in SUCCESS.items():
        for seed in SEEDS:
            write_cell(root, name, seed, solved=solved[seed], skill=SKILLS[name], curve=CURVES.get(name, ()))
    return root


@pytest.fixture
def comparison_dir(tmp_path: Path) -> Path:
    """Five cells with three seeds; PivotRL with seed 1 solves one task more than with the others."""
    return write_comparison(tmp_path / "paper")


@pytest.fixture(scope="session")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> summary.Outcome:
    """The same, read; nobody may change it."""
    return summary.read(write_comparison(tmp_path_factory.mktemp("read") / "paper"))


@pytest.fixture(scope="session")
def numbers(outcome: summary.Outcome) -> dict[str, Any]:
    """summary.json of it."""
    return summary.summarise(outcome)
