"""Re-profiling: when groups stop telling actions apart, profile all candidates with the policy as it is and select pivots anew.

A refresh before step N lies in refreshes/step_N/ of the run folder: profiles.jsonl, then pivots.jsonl, which ends it (empty: none were
left, so training kept its pivots). Every decision follows from files, so a resumed run sees the pivots of an undisturbed one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pivotrl import profiling, selection
from pivotrl.config import Config, ProfileConfig
from pivotrl.diagnostics import mean
from pivotrl.local_rollouts import Sampler, seed_of
from pivotrl.records import read_jsonl, write_jsonl
from pivotrl.types import Pivot
from pivotrl.verifiers.strict import StrictVerifier


def check(options: ProfileConfig) -> None:
    """Raises ValueError for settings that would refresh never, or always."""
    if not 0 < options.refresh_fraction < 1:
        raise ValueError(
            f"profile.refresh_fraction={options.refresh_fraction} must lie between 0 and 1, as a share of the deviation at first"
        )
    if options.refresh_window < 1:
        raise ValueError(f"profile.refresh_window={options.refresh_window} must be a number of steps, 1 or more")


class Deviations(NamedTuple):
    """Reward deviation: the mean of the first `window` steps on the present pivots, and of the last."""

    first: float
    last: float


def deviations(deviation: Callable[[int], float], *, since: int, step: int, window: int) -> Deviations | None:
    """Compare before `step` what was since step `since`; None while the two windows would overlap.

    A single step's deviation depends on which pivots it drew; a mean over some steps is not moved by one of them.
    """
    if step - since < 2 * window:
        return None
    return Deviations(mean([deviation(since + i) for i in range(window)]), mean([deviation(step - 1 - i) for i in range(window)]))


class PivotsAt(NamedTuple):
    """What a step draws from: the pivots, the first step that drew from them, and statistics of a refresh that this step paid for."""

    pivots: Sequence[Pivot]
    since: int
    paid: dict[str, Any]


class Refresher:
    """Decides before each step, in their order, whether to refresh, and does it; lives on the main process.

    `deviation(step)` is the reward deviation of a step that was sampled before.
    """

    def __init__(self, config: Config, sampler: Sampler, pivots: Sequence[Pivot], deviation: Callable[[int], float]):
        check(config.profile)
        self.config, self.sampler, self.deviation = config, sampler, deviation
        self.folder = Path(config.run_dir) / "refreshes"
        self.folder.mkdir(parents=True, exist_ok=True)  # an output of the stage, even when nothing is ever refreshed
        self._pivots: dict[int, Sequence[Pivot]] = {0: pivots}

    def pivots_at(self, step: int) -> PivotsAt:
        """The pivots of `step`, after a refresh if it is due.

        Raises:
            Preempted: asked to leave while profiling, which goes on behind the finished candidates.
        """
        options = self.config.profile
        finished = [0, *self._finished(step)]
        if finished[-1] < step:
            found = deviations(self.deviation, since=finished[-1], step=step, window=options.refresh_window)
            if found is not None and found.last < options.refresh_fraction * found.first:
                self._refresh(step, found)
                finished.append(step)
        since = max(done for done in finished if self._read(done))
        return PivotsAt(self._read(since), since, self._paid(step) if step in finished[1:] else {})

    def _refresh(self, step: int, found: Deviations) -> None:
        candidates, folder = profiling.read_candidates(self.config), self._step_folder(step)
        sentence = f"reward deviation {found.last:.3g} is under profile.refresh_fraction of {found.first:.3g}"
        print(f"step {step + 1}: {sentence}: profiling {len(candidates)} candidates anew", flush=True)
        profiles = profiling.profile_candidates(
            candidates,
            self.sampler,
            folder=folder,
            strict=StrictVerifier(self.config.domain),
            num_samples=self.config.profile.num_samples,
            seed=seed_of(self.config.seed, "refresh", step),
        )
        pivots, counts = selection.pivots_of(candidates, profiles, self.config.profile, seed=self.config.seed)
        write_jsonl(folder / "pivots.jsonl", pivots)
        outcome = "" if pivots else "; no pivots are left, training goes on with the old ones"
        print(f"step {step + 1}: {selection.table_line(counts)}{outcome}", flush=True)
        # `step` is that of the sampling, which may be ahead of the training that logs the event.
        values = {"step": step, "deviation_first": found.first, "deviation_last": found.last, "kept_old_pivots": not pivots}
        self.sampler.client.service.on_event("refresh", values | self._paid(step) | profiling.statistics(profiles))

    def _finished(self, step: int) -> list[int]:
        """The steps of finished refreshes up to `step`, in their order."""
        steps = sorted(int(path.parent.name.removeprefix("step_")) for path in self.folder.glob("step_*/pivots.jsonl"))
        return [done for done in steps if done <= step]

    def _read(self, step: int) -> Sequence[Pivot]:
        if step not in self._pivots:
            self._pivots[step] = read_jsonl(self._step_folder(step) / "pivots.jsonl", Pivot)
        return self._pivots[step]

    def _paid(self, step: int) -> dict[str, Any]:
        profiles = read_jsonl(self._step_folder(step) / "profiles.jsonl", profiling.CountedProfile)
        return {
            "profiling_turns": sum(len(profile.samples) for profile in profiles),
            "profiling_tokens": sum(profile.num_tokens for profile in profiles),
            "refreshed_pivots": len(self._read(step)),
        }

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"
