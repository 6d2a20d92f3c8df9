import dataclasses
from pathlib import Path

import pytest

from pivotrl.config import Config, DomainConfig, EvaluationConfig, ModelConfig, OnChange
from pivotrl.recipe import CONF_DIR, compose, to_dict
from pivotrl.records import write_bytes
from pivotrl.stages import STAGES, describe, final_policy, initial_policy, open_stage, policies, relevant, run_path

RECIPES = CONF_DIR.parent / "recipes"


@pytest.fixture
def config(tmp_path) -> Config:
    return compose("domain=sql", f"domain.data_path={tmp_path}/data", f"run_dir={tmp_path}/run")


def make_inputs(name: str, config: Config) -> None:
    for path in STAGES[name].inputs(config).values():
        write_bytes(path if path.suffix else path / "file", b"content\n")


def make_outputs(name: str, config: Config) -> None:
    for path in STAGES[name].outputs(config):
        write_bytes(path / "file", b"made\n")


def test_every_recipe_opens_its_own_stage():
    """A stage of another name would share a manifest entry, or none would exist to resume."""
    for name in STAGES:
        text = (RECIPES / f"{name}.py").read_text()
        assert f'open_stage("{name}", config' in text and f'run_recipe("{name}", main)' in text
    assert {path.stem for path in RECIPES.glob("*.py")} - STAGES.keys() <= {"run_pipeline", "train_e2e"}


@pytest.mark.parametrize("name", STAGES)
def test_fields_exist_and_are_plain_values(name, config):
    values = relevant(name, config)
    assert tuple(values) == STAGES[name].fields
    assert all(not dataclasses.is_dataclass(value) for value in values.values())
    assert "run_dir" not in str(values) and config.run_dir not in str(values), "moving a run does not undo it"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_done_once_and_refuses_other_settings(name, config):
    make_inputs(name, config)
    with open_stage(name, config) as stage:
        assert not stage.done
        make_outputs(name, config)
    assert open_stage(name, config).done
    group, *rest = STAGES[name].fields[0].split(".")
    section = getattr(config, group)
    field = rest[0] if rest else next(f.name for f in dataclasses.fields(section) if type(getattr(section, f.name)) is int)
    value = getattr(section, field)
    setattr(section, field, value + 1 if isinstance(value, int) else f"{value}x")
    with pytest.raises(ValueError, match=f"stage '{name}' has done output made from something else:\n  {group}"):
        open_stage(name, config)
    config.on_change = OnChange.accept
    assert open_stage(name, config).done


def test_inputs_of_each_stage_are_outputs_of_earlier_ones(config):
    """The run folder is a chain: nothing is read that neither a stage nor the user has written."""
    made = [Path(config.domain.data_path)]
    for name, spec in STAGES.items():
        for key, path in spec.inputs(config).items():
            assert any(path.is_relative_to(folder) for folder in made), f"{name} reads {key} at {path}, which no earlier stage makes"
        made += spec.outputs(config)


def test_a_missing_input_is_named(config):
    with pytest.raises(ValueError, match="stage 'select_pivots' needs candidates at .*candidates.jsonl, which does not exist"):
        open_stage("select_pivots", config)


def test_the_first_policy_is_the_given_one_or_the_warmed_up_one(config):
    assert initial_policy(config) == run_path(config, "hf/sft")
    config.model.hf_path = "/models/base"
    assert initial_policy(config) == Path("/models/base") == STAGES["train_grpo"].inputs(config)["policy"]
    assert STAGES["train_sft"].inputs(config)["policy"] == Path("/models/base")


@pytest.mark.parametrize("name", ["train_sft", "train_grpo"])
def test_training_depends_on_where_it_starts_but_not_on_how_it_is_saved(name, config, tmp_path):
    source = tmp_path / "source" / "step_000004"
    for file in ("checksums.json", "__0_0.distcp"):
        write_bytes(source / file, b"{}")
    write_bytes(source.parent / "latest", b"step_000004")
    make_inputs(name, config)
    with open_stage(name, config):
        make_outputs(name, config)
    config.checkpoint.asynchronous, config.checkpoint.keep_last, config.checkpoint.keep_best = True, 7, 7
    assert open_stage(name, config).done
    config.checkpoint.load_from = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"stage '{name}' needs checkpoint.load_from at .*/nowhere, which does not exist"):
        open_stage(name, config)
    config.checkpoint.load_from = str(source.parent)
    with pytest.raises(
        ValueError, match="made from something else:\n  checkpoint.load_from: None -> .*\n  input checkpoint.load_from: sha256"
    ):
        open_stage(name, config)
    config.on_change = OnChange.restart
    with open_stage(name, config):
        make_outputs(name, config)
    config.on_change = OnChange.refuse
    assert open_stage(name, config).done
    config.checkpoint.without_optimizer = True
    with pytest.raises(ValueError, match="made from something else:\n  checkpoint.without_optimizer: False -> True\n"):
        open_stage(name, config)
    config.checkpoint.without_optimizer = False
    write_bytes(source / "checksums.json", b"{} of other files")
    with pytest.raises(ValueError, match="made from something else:\n  input checkpoint.load_from: sha256"):
        open_stage(name, config)


def test_the_export_depends_on_the_newest_checkpoint_alone(config):
    folder = run_path(config, "checkpoints/grpo")
    for step in ("step_000002", "step_000004"):
        write_bytes(folder / step / "checksums.json", step.encode())
    write_bytes(folder / "latest", b"step_000004")
    with open_stage("export_hf", config):
        make_outputs("export_hf", config)
    write_bytes(folder / "step_000002" / "checksums.json", b"other")
    assert open_stage("export_hf", config).done
    write_bytes(folder / "latest", b"step_000002")
    with pytest.raises(ValueError, match="input checkpoint"):
        open_stage("export_hf", config)


def test_policies_to_evaluate(config):
    assert policies(config) == {"before": initial_policy(config), "after": final_policy(config)}
    chosen = Config(model=ModelConfig(), domain=DomainConfig(), evaluation=EvaluationConfig(policies=["x/one", "y/two"]))
    assert policies(chosen) == {"one": Path("x/one"), "two": Path("y/two")}


def test_description_shows_config_inputs_and_outputs(config):
    config.seed = 4321
    shown = describe("select_pivots", config)
    assert "seed: 4321" in shown and shown.count("(MISSING)") == 2 and "(not started)" in shown and "rule: mixed" in shown
    make_inputs("select_pivots", config)
    with open_stage("select_pivots", config):
        make_outputs("select_pivots", config)
    shown = describe("select_pivots", config)
    assert shown.count("(present)") == 2 and "(done)" in shown and f"writes: {config.pivots_path}" in shown


def test_the_resolved_config_is_kept_beside_the_output(config):
    import yaml

    make_inputs("select_pivots", config)
    with open_stage("select_pivots", config):
        pass
    kept = yaml.safe_load((Path(config.run_dir) / "configs" / "select_pivots.yaml").read_text())
    assert kept == to_dict(config)


def test_a_run_folder_is_trained_over_pivots_or_over_episodes(config):
    """Both write checkpoints/grpo: the second would resume from the first."""
    for name in ("train_grpo", "train_e2e"):
        make_inputs(name, config)
    with open_stage("train_e2e", config):
        make_outputs("train_e2e", config)
    with pytest.raises(
        ValueError, match="holds the output of train_e2e, where train_grpo would write: give train_grpo a run_name of its own"
    ):
        open_stage("train_grpo", config)
    assert open_stage("train_e2e", config).done


def test_two_policies_of_one_name_are_refused(config):
    config = dataclasses.replace(config, evaluation=EvaluationConfig(policies=["runs/a/hf/sft", "runs/b/hf/sft"]))
    with pytest.raises(ValueError, match="folders of one name share"):
        policies(config)
