"""The table of cells: every stage of every job composes, reads what another job writes, and differs in what it says only."""

import functools
from pathlib import Path

import pytest

from pivotrl.paper.cells import CELLS, METHODS, PROFILES, SMOKE, Comparison, find_cells
from pivotrl.recipe import compose
from pivotrl.stages import STAGES, final_policy, initial_policy, policies, relevant

SAMPLE = ("base", "sft", "e2e", "pivotrl", "random_strict", "k8")  # one of every kind: composing them all would take long


@pytest.fixture(scope="module")
def jobs():
    return {job.name: job for job in Comparison(Path("runs/paper"), "paper", (0, 1)).jobs()}


@pytest.fixture(scope="module")
def config(jobs):
    """config(kind, stage): the composed configuration of a stage with seed 1."""

    @functools.cache
    def composed(kind, stage):
        job = jobs.get(f"seed_1/{kind}", jobs["base"])
        stages = dict(job.stages)
        if "evaluate" in stages:
            (_, stages["evaluate"]), (_, stages["greedy"]) = job.stages[-2:]
        return compose(*stages[stage])

    return composed


def test_jobs_come_behind_what_they_need(jobs):
    before: set[str] = set()
    for job in jobs.values():
        assert before.issuperset(job.needs), job
        before.add(job.name)
    assert len(jobs) == 1 + 2 * (len(CELLS) + len(PROFILES))


@pytest.mark.parametrize("name", SAMPLE)
def test_every_stage_reads_what_an_earlier_one_writes(jobs, config, name):
    """Inputs lie in the outputs of an earlier stage of the same job, or of a job that is needed."""
    job = jobs[f"seed_1/{name}"]
    written = [path for stage in ("extract_candidates", "train_sft") for path in STAGES[stage].outputs(config("warm-up", stage))]
    for needed in job.needs[1:]:
        written += STAGES["profile_candidates"].outputs(config(needed.removeprefix("seed_1/"), "profile_candidates"))
    for stage, _ in job.stages:
        reads = STAGES[stage].inputs(config(name, stage)) if stage != "export_hf" else {}  # whose checkpoint must be there to be named
        missing = {key: path for key, path in reads.items() if not any(path.is_relative_to(folder) for folder in written)}
        assert not missing, (stage, missing)
        written += STAGES[stage].outputs(config(name, stage))


def test_cells_differ_in_what_they_say_only(config):
    main = relevant("train_grpo", config("pivotrl", "train_grpo"))
    for cell in CELLS:
        if cell.profile:
            composed = config(cell.name, "train_grpo")
            changed = {name for name, value in relevant("train_grpo", composed).items() if main[name] != value}
            assert changed <= {override.partition("=")[0] for override in cell.overrides}, cell.name
            assert ("domain.verifier" in changed) == (cell.profile == "strict")
            wanted = {"random": "random", "random_strict": "random", "keep_all_zero": "keep_all_zero"}.get(cell.name, "mixed")
            assert composed.profile.rule == wanted and composed.profile.refresh == (cell.name == "refresh")
            assert bool(composed.evaluation.every_steps) == (cell.name == "pivotrl"), "a curve for the methods that Figure 1 shows"
            if cell.name.startswith("max_mean_"):
                assert (
                    composed.profile.max_mean
                    == float(cell.name.removeprefix("max_mean_"))
                    != config("pivotrl", "train_grpo").profile.max_mean
                )
            assert f"profile_{cell.profile}/profiles" in composed.profiles_path
    assert config("profile_k8", "profile_candidates").profile.num_samples == 8
    assert config("e2e", "train_e2e").evaluation.every_steps and not config("sft", "train_sft").evaluation.every_steps


@pytest.mark.parametrize("name", SAMPLE)
def test_all_are_evaluated_alike_and_as_what_they_became(config, name):
    reference, values = (relevant("evaluate", config(cell, "evaluate")) for cell in ("pivotrl", name))
    assert values | {"evaluation": None} == reference | {"evaluation": None}, "the functional verifier for all"
    assert values["evaluation"] | {"policies": None} == reference["evaluation"] | {"policies": None}
    (policy,) = policies(config(name, "evaluate")).values()
    own = config(name, "evaluate")
    assert policy == {"base": initial_policy(own), "sft": Path(own.run_dir) / "hf" / "sft"}.get(name, final_policy(own))


@pytest.mark.parametrize("name", SAMPLE)
def test_the_same_policy_is_evaluated_without_sampling(config, name):
    sampled, greedy = (relevant("evaluate", config(name, stage)) for stage in ("evaluate", "greedy"))
    changed = {field for field, value in sampled["evaluation"].items() if greedy["evaluation"][field] != value}
    assert changed == {"temperature", "max_pivot_candidates"} and greedy["evaluation"]["temperature"] == 0.0
    assert greedy | {"evaluation": None} == sampled | {"evaluation": None}
    assert config(name, "greedy").run_dir == f"{config(name, 'evaluate').run_dir}/greedy"


def test_methods_train_on_the_same_tasks_from_the_same_policy(config):
    sft, e2e, pivotrl = config("sft", "train_sft"), config("e2e", "train_e2e"), config("pivotrl", "train_grpo")
    assert sft.sft.split == e2e.e2e.split == "train" and sft.sft.skill_share == 0 and not sft.sft.train_tokenizer
    assert {c.model.hf_path for c in (sft, e2e, pivotrl)} == {"runs/paper/base/hf/sft"}
    assert {c.candidates_path for c in (sft, e2e, pivotrl)} == {"runs/paper/base/candidates"}
    assert {c.seed for c in (sft, e2e, pivotrl)} == {1} and config("warm-up", "train_sft").seed == 0


def test_own_overrides_come_first_so_that_cells_keep_their_choice():
    comparison = Comparison(
        Path("x"), "paper_smoke", (0,), find_cells(["max_mean_0.4"]), ("profile.max_mean=0.9", "rollout.temperature=0.5")
    )
    stages = {stage: compose(*overrides) for job in comparison.jobs() for stage, overrides in job.stages}
    assert stages["select_pivots"].profile.max_mean == 0.4 and stages["train_grpo"].rollout.temperature == 0.5


def test_another_pi_0_may_share_the_careful_half_which_overlooks_nothing():
    def stages(root, warm_up, *overrides):
        comparison = Comparison(root, "paper", (0,), find_cells(["base"]), overrides, warm_up=warm_up)
        return [compose(*overrides) for _, overrides in comparison.jobs()[0].stages]

    own = stages(Path("runs/paper"), None)
    shared = stages(Path("other"), Path("runs/paper/warm_up"), "domain.warmup_overlooked=0.7")
    for number, stage in enumerate(("extract_candidates", "train_sft")):
        assert relevant(stage, shared[number]) == relevant(stage, own[number]) and shared[number].run_dir == own[number].run_dir
    assert [config.domain.warmup_overlooked for config in own + shared] == [0.0, 0.0, 0.3, 0.3, 0.0, 0.0, 0.7, 0.7]
    assert shared[3].run_dir == "other/base" and shared[3].model.hf_path == own[3].model.hf_path == "runs/paper/warm_up/hf/sft"


def test_ablations_may_have_fewer_seeds():
    jobs = Comparison(Path("x"), "paper", (0, 1), find_cells(["pivotrl", "random", "strict"]), ablation_seeds=(1,)).jobs()
    names = {"seed_0/profile_functional", "seed_0/pivotrl", "seed_1/profile_functional", "seed_1/pivotrl", "seed_1/random"}
    assert {job.name for job in jobs} == names | {"base", "seed_1/profile_strict", "seed_1/strict"}


def test_smoke_and_unknown_cells():
    assert set(METHODS) <= set(SMOKE) and len(SMOKE) >= len(METHODS) + 3
    assert [cell.name for cell in find_cells(["sft", "base"])] == ["base", "sft"] and find_cells(None) == CELLS
    with pytest.raises(ValueError, match="there is no cell pivotlr; known: base, sft, sft_gentle, e2e"):
        find_cells(["base", "pivotlr"])
