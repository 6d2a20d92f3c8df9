"""The Megatron recipes under torchrun with two processes: the first step of every layout is that of a single process."""

import shutil

import pytest

from pivotrl import metrics
from pivotrl.run_folder import RunFolder

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.timeout(1800)]

LAYOUTS = {"dp2": (), "tp2": ("parallel.tensor=2",), "ep2": ("parallel.expert=2",)}
WARM_UP = ("sft.num_steps=1", "sft.train_tokenizer=false", "sft.skill_share=0")


@pytest.fixture(scope="module")
def warm_up_row(recipes, tmp_path_factory, warmed):
    """The first step of supervised training from the shared policy, by a single process."""
    run = tmp_path_factory.mktemp("single")
    recipes.run("train_sft", run, *WARM_UP, f"candidates_path={warmed / 'candidates'}", f"model.hf_path={warmed / 'hf/sft'}")
    return metrics.read(run, "train_sft")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout, recipes, trained, engine, inputs, warm_up_row, tmp_path):
    run, parallel = tmp_path / layout, LAYOUTS[layout]
    recipes.run("train_sft", run, *WARM_UP, *inputs, *parallel, processes=2)
    agree(metrics.read(run, "train_sft")[0], warm_up_row)

    (run / "rollouts").mkdir()
    shutil.copy2(trained / "rollouts/step_000000.jsonl", run / "rollouts")
    recipes.run("train_grpo", run, *inputs, *parallel, engine, "algorithm.num_steps=1", processes=2)
    (row,) = metrics.read(run, "train_grpo")
    agree(row, metrics.read(trained, "train_grpo")[0])
    assert row["policy_version"] == 1 and RunFolder(run).manifest()["train_grpo"]["counts"]["weight_syncs_verified"] == 1

    recipes.run("export_hf", run, *inputs, *parallel, processes=2)
    assert RunFolder(run).manifest()["export_hf"]["counts"]["max_logprob_difference"] < 1e-4


def agree(row, expected):
    for name in ("loss", "grad_norm"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    assert row["train_tokens"] == expected["train_tokens"]
