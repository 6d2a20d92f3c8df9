"""The house rules as far as a program can hold them: import arrows, homes of libraries, banned names, sizes, clean files."""

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for folder in ("pivotrl", "recipes", "tools") for path in (ROOT / folder).rglob("*.py"))
PACKAGE = [path for path in SOURCES if path.is_relative_to(ROOT / "pivotrl")]

HOMES = {  # library -> the only places that may import it, anywhere in a file
    "vllm": ("pivotrl/rollout/",),
    "megatron": ("pivotrl/megatron/",),
    "transformer_engine": ("pivotrl/megatron/",),
    "triton": ("pivotrl/megatron/",),
    "tau2": ("pivotrl/environments/tau2_telecom.py",),
    "httpx": ("pivotrl/rollout/", "pivotrl/verifiers/judge_client.py"),
    "pebble": ("pivotrl/verifiers/pool.py",),
    "wandb": ("pivotrl/metrics.py",),
    "hydra": ("pivotrl/recipe.py", "pivotrl/pipeline.py", "tools/"),
    "tokenizers": ("pivotrl/tokenizer.py", "tools/"),
    "transformers": ("pivotrl/render.py", "pivotrl/tokenizer.py", "pivotrl/export.py", "tools/"),
}
FORBIDDEN = {  # who may not import whom, directly or by way of others, when modules are loaded
    "pivotrl/cluster_config.py": ("pivotrl.",),
    "pivotrl/verifier_config.py": ("pivotrl.",),
    "pivotrl/types.py": ("pivotrl.",),
    "pivotrl/verifiers/": ("pivotrl.rollout", "pivotrl.megatron", "pivotrl.evaluation", "pivotrl.grpo"),
    "pivotrl/environments/": ("pivotrl.rollout", "pivotrl.megatron", "pivotrl.sources", "pivotrl.verifiers", "pivotrl.evaluation"),
    "pivotrl/sources/": ("pivotrl.rollout", "pivotrl.megatron", "pivotrl.verifiers", "pivotrl.evaluation"),
    "pivotrl/rollout/": ("pivotrl.megatron", "pivotrl.verifiers", "pivotrl.sources", "pivotrl.environments"),
    "pivotrl/megatron/": ("pivotrl.rollout", "pivotrl.verifiers", "pivotrl.sources", "pivotrl.environments", "pivotrl.render"),
    "pivotrl/local_rollouts.py": ("pivotrl.megatron",),
    "pivotrl/evaluation/": ("pivotrl.megatron",),
    "pivotrl/loss.py": ("pivotrl.megatron", "pivotrl.rollout"),
    "pivotrl/batching.py": ("pivotrl.megatron", "pivotrl.rollout"),
    "pivotrl/plan/": ("pivotrl.megatron", "pivotrl.rollout", "pivotrl.batching", "pivotrl.grpo", "pivotrl.recipe"),
}
LIGHT = (
    "pivotrl/config.py",
    "pivotrl/cluster_config.py",
    "pivotrl/verifier_config.py",
    "pivotrl/recipe.py",
    "pivotrl/types.py",
    "pivotrl/records.py",
)
LIGHT += tuple(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "pivotrl" / "plan").glob("*.py")))  # sizing needs no torch
HEAVY = {"torch", "vllm", "megatron", "tau2", "transformers", "datasets", "numpy", "matplotlib", "hydra", "httpx", "pebble"}
ENVIRONMENT_READERS = {"pivotrl/rollout/service.py", "pivotrl/megatron/parallel.py"}
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
BANNED_CALLS = {
    "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.load", "eval", "exec", "compile", "yaml.load", "yaml.unsafe_load",
}  # fmt: skip
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 100, 7
LONG_FUNCTIONS: set[str] = set()  # over 50 lines, each with its reason
WITHOUT_A_TEST_OF_THEIR_OWN = {  # module -> the test that covers it
    "pivotrl/types.py": "tests/test_records.py",
    "pivotrl/config.py": "tests/test_configs.py",
    "pivotrl/cluster_config.py": "tests/test_configs.py",
    "pivotrl/verifier_config.py": "tests/test_configs.py",
    "pivotrl/rollout/receiver.py": "tests/test_weight_sync.py",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(path): path for path in PACKAGE}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(node: ast.AST, *, top_level: bool) -> Iterator[ast.AST]:
    """All nodes below, without what only a type checker sees; with `top_level`, without functions' bodies."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child) or (top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            continue
        yield child
        yield from nodes(child, top_level=top_level)


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names of imported modules; `from package import submodule` counts as the submodule."""
    found = set()
    for node in nodes(tree(path), top_level=top_level):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def loaded_by(module: str, seen: set[str] | None = None) -> set[str]:
    """Modules of ours that loading this one loads: its imports, theirs, and the packages around them."""
    seen = set() if seen is None else seen
    for name in imports(MODULES[module], top_level=True) & MODULES.keys():
        parts = name.split(".")
        for wanted in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if wanted not in seen:
                seen.add(wanted)
                loaded_by(wanted, seen)
    return seen


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_rules_would_notice():
    """The walkers below see what they must see: nested, aliased and lazy imports, but nothing under TYPE_CHECKING."""
    assert "vllm.platforms" in imports(ROOT / "pivotrl/rollout/receiver.py")
    assert "transformers" in imports(ROOT / "pivotrl/tokenizer.py")
    assert "transformers" not in imports(ROOT / "pivotrl/tokenizer.py", top_level=True)
    assert {"pivotrl.megatron.policy", "pivotrl.batching", "pivotrl.rollout.client"} <= loaded_by("pivotrl.grpo")
    assert len(PACKAGE) > 30


@pytest.mark.parametrize("library", HOMES)
def test_libraries_live_in_their_homes(library):
    users = {name_of(path) for path in SOURCES if library in {name.partition(".")[0] for name in imports(path)}}
    assert {user for user in users if not user.startswith(HOMES[library])} == set()


@pytest.mark.parametrize("who", FORBIDDEN)
def test_import_arrows(who):
    members = [module for module, path in MODULES.items() if name_of(path).startswith(who)]
    assert members
    for module in members:
        wrong = {name for name in loaded_by(module) if name.startswith(FORBIDDEN[who])}
        assert not wrong, f"{module} loads {sorted(wrong)}"


@pytest.mark.parametrize("name", LIGHT)
def test_contracts_are_light(name):
    assert not {module.partition(".")[0] for module in imports(ROOT / name, top_level=True)} & HEAVY


def test_the_schema_rests_on_nothing_but_its_own_parts():
    assert loaded_by("pivotrl.config") == {"pivotrl", "pivotrl.cluster_config", "pivotrl.verifier_config"}


def test_no_import_cycles():
    graph = {module: imports(path, top_level=True) & MODULES.keys() - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        pytest.fail(f"import cycle: {' -> '.join(cycle.args[1])}")


def test_no_module_is_called_miscellaneous():
    assert not [name_of(path) for path in SOURCES if BANNED_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}]


def test_the_environment_is_no_configuration():
    pattern = re.compile(r"\bos\.environ\b|\bgetenv\b|from os import .*environ")
    assert {name_of(path) for path in SOURCES if pattern.search(path.read_text())} <= ENVIRONMENT_READERS


def test_nothing_dangerous_is_called():
    found = []
    for path in SOURCES:
        assert not {"pickle", "cloudpickle", "dill", "joblib"} & imports(path), f"{name_of(path)} unpickles"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                if ast.unparse(node.func) in BANNED_CALLS or any(k.arg == "shell" for k in node.keywords):
                    found.append(f"{name_of(path)}:{node.lineno} {ast.unparse(node)[:60]}")
        if re.search(r"\b(pkill|killall)\b", path.read_text()):
            found.append(f"{name_of(path)} stops processes by name")
    assert found == []


def test_files_and_functions_are_of_readable_size():
    long_files = [name_of(path) for path in SOURCES if len(path.read_text().splitlines()) > MAX_FILE_LINES]
    assert long_files == []
    sizes = {f"{name_of(path)}:{f.name}": f.end_lineno - f.lineno + 1 for path in SOURCES for f in functions(path)}
    assert max(sizes.values()) <= MAX_FUNCTION_LINES
    assert {where for where, lines in sizes.items() if lines > 50} == LONG_FUNCTIONS


def test_functions_take_few_parameters():
    many = []
    for path in SOURCES:
        for f in functions(path):
            names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
            if len(names) > MAX_PARAMETERS:
                many.append(f"{name_of(path)}:{f.name} takes {len(names)}")
    assert many == []


def test_the_loop_is_short():
    path = ROOT / "pivotrl" / "grpo.py"
    train = next(f for f in functions(path) if f.name == "train")
    assert train.end_lineno - train.lineno + 1 <= 60


def tracked_text() -> Iterator[tuple[str, str]]:
    """(name, text) of every file that a clone would hold."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path != Path(__file__).resolve():
            yield name, path.read_bytes().decode("utf-8", errors="ignore")


def test_no_file_knows_this_machine_or_a_registry():
    # Written in pieces, so that a search for them does not find this line.
    machine = re.compile("|".join(("/wo" + "rk/", "/ro" + "ot/", r"(?<![\w.])/ho" + r"me/\w")))
    registry = re.compile(
        "|".join(("py" + r"pi\.", "python" + "hosted", r"--(extra-)?index" + "-url", "jfrog|arti" + "factory", r"download\.py" + "torch"))
    )
    found = []
    for name, text in tracked_text():
        for number, line in enumerate(text.splitlines(), start=1):
            if machine.search(line) or (registry.search(line) and "example" not in line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []


def test_tests_mirror_the_modules():
    def mirror_of(path: Path) -> Path:
        relative = path.relative_to(ROOT / "pivotrl")
        return ROOT / "tests" / relative.parent / f"test_{relative.name}"

    without = {name_of(path) for path in PACKAGE if path.name != "__init__.py" and not mirror_of(path).exists()}
    assert without == WITHOUT_A_TEST_OF_THEIR_OWN.keys(), "every module has its test file"
    for module, test in WITHOUT_A_TEST_OF_THEIR_OWN.items():
        assert (ROOT / test).exists(), f"{module} should be covered by {test}"


def test_no_test_is_without_assertions_to_fail():
    """A test that can only pass proves nothing."""
    empty = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        for f in functions(path):
            calls = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(f) if isinstance(node, ast.Call)}
            checks = any("assert" in name or "check" in name or "expect" in name or name in ("raises", "fail") for name in calls)
            if f.name.startswith("test_") and not checks and not any(isinstance(node, ast.Assert) for node in ast.walk(f)):
                empty.append(f"{name_of(path)}:{f.name}")
    assert empty == []
