"""What is compared: the table of cells, and the stages with their overrides that make each one.

A cell is one method or ablation; every cell is run with every seed. All start from the same pi_0 (FOLDER/base) and the same split of tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLING = ("profile_candidates", "train_grpo", "train_e2e", "evaluate")  # stages that need rollout servers
# Only the tasks matter to a curve over training; skills and held-out turns are measured once, at the end.
CURVE = ("evaluation.max_pivot_candidates=0", "evaluation.skill_examples=1")
NO_CURVE = ("evaluation.every_steps=0",)
GREEDY = ("evaluation.temperature=0.0", "evaluation.max_pivot_candidates=0")


@dataclass(frozen=True)
class Cell:
    """One row of the comparison.

    Attributes:
        train: the recipe that trains it; None: pi_0 as it is.
        overrides: what it changes, in every stage but the evaluation.
        profile: the row of PROFILES that its pivots are selected from; None: it has no pivots.
        variant: suffix of the experiment's name: conf/experiment/paper<variant>.yaml holds the method's own settings.
        curve: whether held-out tasks are also run during training, every evaluation.every_steps steps.
    """

    name: str
    title: str
    train: str | None = "train_grpo"
    overrides: tuple[str, ...] = ()
    profile: str | None = "functional"
    variant: str = ""
    curve: bool = False

    def stages(self) -> tuple[str, ...]:
        """Its recipes in order."""
        before = ("select_pivots",) if self.profile else ()
        after = ("export_hf",) if self.train in ("train_grpo", "train_e2e") else ()
        return (*before, *((self.train,) if self.train else ()), *after, "evaluate")


STRICT = ("domain.verifier=strict",)
SFT = ("sft.split=train", "sft.skill_share=0", "sft.train_tokenizer=false")
SFT_GENTLE = ("sft.optimizer.lr=3e-4", "sft.optimizer.min_lr=3e-5")
PROFILES: dict[str, tuple[str, ...]] = {
    "functional": (),
    "strict": STRICT,
    "k8": ("profile.num_samples=8",),
    "k32": ("profile.num_samples=32",),
}
CELLS = (
    Cell("base", "pi_0, before training", train=None, profile=None),
    Cell("sft", "SFT on the expert's turns", "train_sft", SFT, None, "_sft"),
    Cell("sft_gentle", "SFT at a third of the rate", "train_sft", (*SFT, *SFT_GENTLE), None, "_sft"),
    Cell("e2e", "end-to-end RL", "train_e2e", ("e2e.split=train",), None, "_e2e", curve=True),
    Cell("pivotrl", "PivotRL", curve=True),
    Cell("random", "random turns, no selection", overrides=("profile.rule=random",)),
    Cell("strict", "strict reward", overrides=STRICT, profile="strict"),
    Cell("random_strict", "random turns and strict reward", overrides=("profile.rule=random", *STRICT), profile="strict"),
    Cell("keep_all_zero", "all-zero turns kept", overrides=("profile.rule=keep_all_zero",)),
    Cell("max_mean_0.4", "lambda 0.4", overrides=("profile.max_mean=0.4",)),
    Cell("max_mean_0.6", "lambda 0.6", overrides=("profile.max_mean=0.6",)),
    Cell("max_mean_0.8", "lambda 0.8", overrides=("profile.max_mean=0.8",)),
    Cell("k8", "K = 8 samples a turn", overrides=PROFILES["k8"], profile="k8"),
    Cell("k32", "K = 32 samples a turn", overrides=PROFILES["k32"], profile="k32"),
    Cell("refresh", "profiled anew when the deviation falls", overrides=("profile.refresh=true",)),
)
METHODS = ("base", "sft", "e2e", "pivotrl")
SMOKE = (*METHODS, "random", "strict", "keep_all_zero")


def find_cells(names: Sequence[str] | None) -> tuple[Cell, ...]:
    """Rows of the table by name, in the table's order; None: all.

    Raises:
        ValueError: there is no such cell; lists them all.
    """
    known = [cell.name for cell in CELLS]
    names = known if names is None else names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no cell {', '.join(unknown)}; known: {', '.join(known)}")
    return tuple(cell for cell in CELLS if cell.name in names)


@dataclass(frozen=True)
class Folders:
    """Where everything of one comparison lies."""

    root: Path

    @property
    def warm_up(self) -> Path:
        """The run folder of the careful half of the warm-up."""
        return self.root / "warm_up"

    @property
    def base(self) -> Path:
        """The run folder of the data that all share, and of the careless half of the warm-up, which ends in pi_0."""
        return self.root / "base"

    @property
    def pi_0(self) -> Path:
        return self.base / "hf" / "sft"

    def cell(self, name: str, seed: int) -> Path:
        """The run folder of one cell with one seed."""
        return self.root / f"seed_{seed}" / name

    def greedy(self, name: str, seed: int) -> Path:
        """The run folder in which the cell's policy is evaluated a second time, without sampling."""
        return self.cell(name, seed) / "greedy"

    def profile(self, name: str, seed: int) -> Path:
        """The run folder of one profile with one seed."""
        return self.root / f"seed_{seed}" / f"profile_{name}"


@dataclass(frozen=True)
class Job:
    """Stages that are run one after the other, each a recipe with its overrides; `needs` are jobs that must be done before."""

    name: str
    stages: tuple[tuple[str, tuple[str, ...]], ...]
    needs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Its name without the seed: jobs of one kind take about as long."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Comparison:
    """Which experiment, seeds and cells.

    Attributes:
        overrides: go to every stage, before the cells' own.
        ablation_seeds: None: as `seeds`.
        warm_up: the run folder of the careful half of the warm-up, to share one with another comparison; None: in `root`.
    """

    root: Path
    experiment: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...] = CELLS
    overrides: tuple[str, ...] = ()
    ablation_seeds: tuple[int, ...] | None = None
    warm_up: Path | None = None

    def seeds_of(self, cell: Cell) -> tuple[int, ...]:
        """The seeds that a cell is run with."""
        return self.seeds if cell.name in METHODS or self.ablation_seeds is None else self.ablation_seeds

    @property
    def folders(self) -> Folders:
        return Folders(self.root)

    def jobs(self) -> list[Job]:
        """The warm-up, then cell after cell with its seeds, each profile before the first cell that needs it."""
        found = {"base": self._warm_up()}
        for cell in self.cells:
            for seed in self.seeds_of(cell):
                needs = ["base"]
                if cell.profile:
                    profile = self._profile(cell.profile, seed)
                    found.setdefault(profile.name, profile)
                    needs.append(profile.name)
                stages = [(stage, self._overrides(cell, seed, stage)) for stage in cell.stages()]
                greedy = ("evaluate", (*self._evaluation(cell, seed, self.folders.greedy(cell.name, seed)), *GREEDY))
                job = Job(f"seed_{seed}/{cell.name}", (*stages, greedy), tuple(needs))
                found[job.name] = job
        return list(found.values())

    def _warm_up(self) -> Job:
        """First to know what to do, then often not to do it (domain.warmup_overlooked): a policy that can learn without being taught."""
        warm_up, stages = self.warm_up or self.folders.warm_up, ("extract_candidates", "train_sft")
        careful = (f"experiment={self.experiment}", f"run_dir={warm_up}", *self.overrides, "domain.warmup_overlooked=0")
        careless = (f"experiment={self.experiment}_careless", f"run_dir={self.folders.base}", *self.overrides)
        started = (*careless, f"model.hf_path={warm_up / 'hf' / 'sft'}")
        return Job("base", (*((stage, careful) for stage in stages), (stages[0], careless), (stages[1], started)))

    def _profile(self, name: str, seed: int) -> Job:
        run_dir = self.folders.profile(name, seed)
        overrides = (*self._shared(run_dir, seed), *PROFILES[name])
        return Job(f"seed_{seed}/{run_dir.name}", (("profile_candidates", overrides),), ("base",))

    def _overrides(self, cell: Cell, seed: int, stage: str) -> tuple[str, ...]:
        run_dir = self.folders.cell(cell.name, seed)
        if stage == "evaluate":
            return self._evaluation(cell, seed, run_dir)
        shared = self._shared(run_dir, seed, cell.variant)
        profiles = (f"profiles_path={self.folders.profile(cell.profile, seed) / 'profiles'}",) if cell.profile else ()
        return (*shared, *profiles, *cell.overrides, *(CURVE if cell.curve else NO_CURVE))

    def _evaluation(self, cell: Cell, seed: int, run_dir: Path) -> tuple[str, ...]:
        """Always by the functional verifier, in the same way for all."""
        trained = self.folders.cell(cell.name, seed) / "hf"
        made = {None: self.folders.pi_0, "train_sft": trained / "sft"}.get(cell.train, trained / "final")
        return (*self._shared(run_dir, seed, cell.variant), f"evaluation.policies=[{made}]", *NO_CURVE)

    def _shared(self, run_dir: Path, seed: int, variant: str = "") -> tuple[str, ...]:
        base = self.folders
        paths = (f"run_dir={run_dir}", f"candidates_path={base.base / 'candidates'}", f"model.hf_path={base.pi_0}")
        return (f"experiment={self.experiment}{variant}", *paths, f"seed={seed}", *self.overrides)
