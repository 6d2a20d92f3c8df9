"""A domain with real recorded episodes and real databases, from extraction to training."""

import pytest

from pivotrl import metrics
from pivotrl.records import read_jsonl
from pivotrl.run_folder import RunFolder
from pivotrl.types import Candidate, Group, Profile

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.timeout(1800)]


def test_sql_from_extraction_to_training(recipes, shared_data, engine, tmp_path):
    run = tmp_path / "run"
    sql = (
        "domain=sql", f"domain.data_path={shared_data / 'intercode_sql'}", "sft.split=train", "domain.num_warmup_tasks=0",
        "sft.skill_share=0", "sft.num_steps=60", "algorithm.num_steps=2", engine,
    )  # fmt: skip
    for stage in ("extract_candidates", "train_sft", "profile_candidates", "select_pivots", "train_grpo"):
        recipes.run(stage, run, *sql)
    candidates = read_jsonl(run / "candidates/candidates.jsonl", Candidate)
    assert candidates and all(c.domain == "sql" for c in candidates)
    profiles = read_jsonl(run / "profiles/profiles.jsonl", Profile)
    samples = [sample for profile in profiles for sample in profile.samples]
    assert {sample.status for sample in samples} == {"ok"} and {sample.reward for sample in samples} == {0.0, 1.0}
    rows = metrics.read(run, "train_grpo")
    assert len(rows) == 2 and all(row["grad_norm"] > 0 and row["logprob_gap"] < 1e-3 for row in rows)
    verdicts = [r.verdict for step in range(2) for g in read_jsonl(run / f"rollouts/step_{step:06d}.jsonl", Group) for r in g.rollouts]
    assert {verdict.status for verdict in verdicts} == {"ok"}
    assert all(entry["status"] == "done" for entry in RunFolder(run).manifest().values())
