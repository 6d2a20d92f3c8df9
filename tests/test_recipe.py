import sys

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pivotrl.config import AdvantageKind, Config, SelectionRule
from pivotrl.recipe import CONF_DIR, compose, register, run_recipe, to_dict, typed


def test_composition_gives_checked_dataclasses():
    config = compose("profile.rule=random", "algorithm.advantage=leave_one_out", "rollout.urls=[http://a,http://b]", "run_name=demo")
    assert isinstance(config, Config) and config.profile.rule is SelectionRule.random
    assert config.algorithm.advantage is AdvantageKind.leave_one_out and config.rollout.urls == ["http://a", "http://b"]
    assert (config.run_dir, config.pivots_path) == ("runs/demo", "runs/demo/pivots")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("algorithm.num_stepz=1", "num_stepz"),
        ("+algorithm.typo=1", "typo"),
        ("+typo=1", "typo"),
        ("+sft.optimizer.typo=1", "sft.optimizer.typo"),
        ("algorithm.num_steps=many", "algorithm.num_steps"),
        ("profile.rule=mixd", "profile.rule"),
        ("parallel.recompute=some", "parallel.recompute"),
        ("algorithm.num_steps=null", "num_steps"),
        ("rollout.urls={a: b}", "urls"),
        ("run_name=${nowhere}", "nowhere"),
        ("model=tyny", "tiny"),
        ("experiment=quikstart", "quickstart"),
    ],
)
def test_a_mistake_is_refused_with_its_name(override, text):
    with pytest.raises((OmegaConfBaseException, HydraException), match=text):
        compose(override)


def test_a_typo_in_a_file_is_refused_with_its_name(tmp_path):
    for path in CONF_DIR.rglob("*.yaml"):
        copy = tmp_path / path.relative_to(CONF_DIR)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    with open(tmp_path / "algorithm" / "grpo.yaml", "a") as file:
        file.write("grup_size: 3\n")
    register()
    with initialize_config_dir(str(tmp_path), version_base="1.3"), pytest.raises(HydraException, match="grpo.*") as refused:
        typed(hydra_compose("config"))
    assert "grup_size" in str(refused.value.__cause__ or refused.value)


def test_a_field_without_a_value_is_named():
    with pytest.raises(MissingMandatoryValue, match="model.name"):
        typed(OmegaConf.create({}))


def test_to_dict_is_plain_and_comes_back():
    config = compose("experiment=quickstart")
    plain = to_dict(config)
    assert type(plain["algorithm"]) is dict and plain["profile"]["rule"] == "mixed"
    assert typed(OmegaConf.create(plain)) == config


def start(monkeypatch, tmp_path, main, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", f"run_dir={tmp_path / 'run'}", *overrides])
    run_recipe("select_pivots", main)


def test_a_recipe_gets_its_config_and_leaves_no_other_folder(monkeypatch, tmp_path):
    got = []
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, tmp_path, got.append, "seed=3")
    assert got[0].seed == 3 and list(tmp_path.iterdir()) == []


def test_dry_run_tells_and_does_nothing(monkeypatch, tmp_path, capsys):
    start(monkeypatch, tmp_path, lambda config: pytest.fail("ran"), "dry_run=true", "profile.max_mean=0.25")
    shown = capsys.readouterr().out
    assert "max_mean: 0.25" in shown and "MISSING" in shown and f"writes: {tmp_path}/run/pivots" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_a_users_mistake_ends_with_one_sentence(monkeypatch, tmp_path, error):
    def main(config):
        raise error("set the thing")

    with pytest.raises(SystemExit) as end:
        start(monkeypatch, tmp_path, main)
    log = tmp_path / "run" / "error.log"
    assert end.value.code == f"select_pivots: set the thing\n(traceback in {log})" and "in main" in log.read_text()


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def main(config):
        raise AssertionError("invariant")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(AssertionError, match="invariant"):
        start(monkeypatch, tmp_path, main)


def test_an_unknown_key_ends_a_recipe_with_its_name(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="select_pivots: .*typo"):
        start(monkeypatch, tmp_path, lambda config: pytest.fail("ran"), "+algorithm.typo=1")
