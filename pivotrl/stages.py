"""What each stage reads, writes and depends on: the run folder's layout in one table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivotrl.config import Config
from pivotrl.megatron.checkpoint_folder import fingerprint
from pivotrl.recipe import to_dict
from pivotrl.run_folder import RunFolder, Stage


@dataclass(frozen=True)
class StageSpec:
    """`fields` are the dotted config fields (or groups) that decide what the stage makes."""

    fields: tuple[str, ...]
    inputs: Callable[[Config], dict[str, Path]]
    outputs: Callable[[Config], list[Path]]


def initial_policy(config: Config) -> Path:
    """Hugging Face folder of pi_0: model.hf_path, or what train_sft wrote."""
    return Path(config.model.hf_path) if config.model.hf_path else run_path(config, "hf/sft")


def final_policy(config: Config) -> Path:
    """Hugging Face folder that export_hf writes."""
    return run_path(config, "hf/final")


def run_path(config: Config, relative: str) -> Path:
    return Path(config.run_dir) / relative


def policies(config: Config) -> dict[str, Path]:
    """The policies to evaluate by label: before and after training, or evaluation.policies by their folders' names.

    Raises:
        ValueError: two of evaluation.policies have the same name, so one's results would replace the other's.
    """
    if given := config.evaluation.policies:
        found = {Path(path).name: Path(path) for path in given}
        if len(found) < len(given):
            raise ValueError(f"evaluation.policies={list(given)}: folders of one name share evaluation/<name>; evaluate them in two runs")
        return found
    return {"before": initial_policy(config), "after": final_policy(config)}


def _data(config: Config) -> dict[str, Path]:
    path = config.domain.data_path
    return {"data": Path(path)} if path and "://" not in path else {}  # a dataset is known by its name in the config


def _candidates(config: Config, *names: str) -> dict[str, Path]:
    return {name.split(".")[0]: Path(config.candidates_path) / name for name in names}


def _start(config: Config) -> dict[str, Path]:
    path = config.checkpoint.load_from
    return {"checkpoint.load_from": fingerprint(Path(path))} if path else {}


_JUDGING = ("model", "call_prompt", "message_prompt", "history_chars", "max_chars", "num_votes", "temperature", "max_tokens")
_VERIFYING = (
    "domain.verifier",
    *(f"domain.verification.{name}" for name in ("tool_call", "gym", "terminal", "swe", "search", "compose")),
    *(f"domain.verification.judge.{name}" for name in _JUDGING),  # not where its servers and its cache are
)
_SAMPLING = ("rollout.temperature", "rollout.top_p", "rollout.max_new_tokens", "rollout.max_prompt_tokens", "rollout.dtype")
_TRAINING = ("model", "parallel", "precision", "kernels", "batching", "checkpoint.load_from", "checkpoint.without_optimizer", "seed")
_REFRESHING = tuple(
    f"profile.{name}" for name in ("refresh", "refresh_fraction", "refresh_window", "num_samples", "max_candidates", "rule", "max_mean")
)

STAGES: dict[str, StageSpec] = {
    "extract_candidates": StageSpec(
        (
            "domain.name",
            "domain.source",
            "domain.data_path",
            "domain.system_prompt",
            "domain.num_heldout_tasks",
            "domain.num_warmup_tasks",
            "domain.num_train_tasks",
            "seed",
        ),
        _data,
        lambda c: [Path(c.candidates_path)],
    ),
    "train_sft": StageSpec(
        ("sft", *_TRAINING),
        lambda c: {
            **_candidates(c, "trajectories.jsonl", "tools.json"),
            **({"policy": Path(c.model.hf_path)} if c.model.hf_path else {}),
            **_start(c),
        },
        lambda c: [run_path(c, "checkpoints/sft"), run_path(c, "tokenizer"), run_path(c, "hf/sft")],
    ),
    "profile_candidates": StageSpec(
        ("profile.num_samples", "profile.max_candidates", *_VERIFYING, "seed", *_SAMPLING),
        lambda c: {**_candidates(c, "candidates.jsonl", "tools.json"), "policy": initial_policy(c)},
        lambda c: [Path(c.profiles_path)],
    ),
    "select_pivots": StageSpec(
        ("profile.rule", "profile.max_mean", "seed"),
        lambda c: {**_candidates(c, "candidates.jsonl"), "profiles": Path(c.profiles_path) / "profiles.jsonl"},
        lambda c: [Path(c.pivots_path)],
    ),
    "train_grpo": StageSpec(
        ("algorithm", "optimizer", *_REFRESHING, *_VERIFYING, *_SAMPLING, *_TRAINING),
        lambda c: {
            "pivots": Path(c.pivots_path) / "pivots.jsonl",
            **_candidates(c, *(["candidates.jsonl"] if c.profile.refresh else []), "tools.json"),
            "policy": initial_policy(c),
            **_start(c),
        },
        lambda c: [run_path(c, name) for name in ("checkpoints/grpo", "rollouts", *(["refreshes"] if c.profile.refresh else []))],
    ),
    "train_e2e": StageSpec(
        ("e2e", "algorithm", "optimizer", "domain.environment", *_SAMPLING, *_TRAINING),
        lambda c: {**_candidates(c, "trajectories.jsonl", "tools.json"), **_data(c), "policy": initial_policy(c), **_start(c)},
        lambda c: [run_path(c, "checkpoints/grpo"), run_path(c, "rollouts")],
    ),
    "export_hf": StageSpec(
        ("model", "precision"),
        lambda c: {"checkpoint": fingerprint(run_path(c, "checkpoints/grpo"))},
        lambda c: [final_policy(c)],
    ),
    "evaluate": StageSpec(
        ("evaluation", *_VERIFYING, "domain.environment", "seed", *_SAMPLING),
        lambda c: {**_candidates(c, "trajectories.jsonl", "heldout.jsonl", "tools.json"), **policies(c)},
        lambda c: [run_path(c, "evaluation")],
    ),
}


def open_stage(name: str, config: Config, *, writes: bool = True) -> Stage:
    """Begin, resume or skip a stage of the run; see RunFolder.stage.

    Raises:
        ValueError: as there; or the run folder belongs to another way of training.
    """
    spec = STAGES[name]
    run = RunFolder(Path(config.run_dir), writes=writes)
    for other in run.manifest().keys() & STAGES.keys() - {name}:
        if set(STAGES[other].outputs(config)) & set(spec.outputs(config)):
            raise ValueError(f"{config.run_dir} holds the output of {other}, where {name} would write: give {name} a run_name of its own")
    return run.stage(
        name,
        relevant(name, config),
        spec.inputs(config),
        outputs=spec.outputs(config),
        on_change=config.on_change,
        resolved=to_dict(config),
    )


def relevant(name: str, config: Config) -> dict[str, Any]:
    """The values of the config fields that decide what a stage makes, by dotted name."""
    values: dict[str, Any] = {}
    for field in STAGES[name].fields:
        value: Any = to_dict(config)
        for part in field.split("."):
            value = value[part]
        values[field] = value
    return values


def describe(name: str, config: Config) -> str:
    """What a stage would do: the resolved config, its inputs (present or missing) and its outputs."""
    import yaml

    spec = STAGES[name]
    text = yaml.safe_dump(_plain(to_dict(config)), sort_keys=False)
    lines = [f"{key}: {path} ({'present' if path.exists() else 'MISSING'})" for key, path in spec.inputs(config).items()]
    lines += [f"writes: {path}" for path in spec.outputs(config)]
    status = RunFolder(Path(config.run_dir)).manifest().get(name, {}).get("status", "not started")
    return f"{text}\n{name} in {config.run_dir} ({status}) would read and write\n  " + "\n  ".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value
