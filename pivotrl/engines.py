"""The rollout engines as the trainer sees them: given the policy's weights, proven to sample from them, never older than allowed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from pivotrl import preemption, watchdog, weight_sync
from pivotrl.ahead import Ahead, Served
from pivotrl.colocated import Turns
from pivotrl.config import Config
from pivotrl.groups import GroupSource
from pivotrl.megatron import parallel
from pivotrl.megatron.policy import Policy

NUM_PROBES = 4
PROBE_TOKENS = 128  # of each probe after a push beside sampling: where a transfer or a kernel is broken any tokens show it


class Engines:
    """Every process calls the same methods; `source` exists on the main process only. `phase(name)` times a part of a step.

    Attributes:
        version: of the policy whose weights the engines hold.
        turns: who may use shared GPUs.
        ahead: what samples the steps, since `sampling`.
    """

    ahead: Ahead

    def __init__(self, config: Config, policy: Policy, source: GroupSource | None, phase: Callable[[str], AbstractContextManager[None]]):
        self.config, self.policy, self.source, self.phase = config, policy, source, phase
        self.version = 0
        self.service = source.sampler.client.service if source is not None else None
        self.turns = Turns(policy, self.service, shared=config.rollout.colocated)

    def start(self, version: int) -> None:
        """Prove that the engines sample from the policy: as loaded, and again after a push, before anything depends on it."""
        if self.source is not None:
            self.source.sampler.client.wait_ready()
        with watchdog.waiting("start of the rollout servers"):
            preemption.leave_if_agreed("nothing new to save")
        if version == 0 and not self.config.checkpoint.load_from:  # else the engines are yet to get those weights
            self._prove()
        self.push(version)
        self._prove()

    def sampling(self, start: int, on_event: Callable[[int, str, dict[str, Any]], None]) -> Ahead:
        """The sampling of all steps from `start` on, by the weights that the engines hold now; a context manager."""
        self.ahead = Ahead(
            self.source,
            served=Served(start, self.version),
            end=self.config.algorithm.num_steps,
            max_staleness=self.config.algorithm.max_staleness,
            run_dir=Path(self.config.run_dir),
            on_event=on_event,
        )
        return self.ahead

    def refresh(self, step: int, version: int, *, now: bool) -> dict[str, float]:
        """Give the engines the policy as it is before `step`, unless they have it, or are sampling while nobody waits for them.

        With `now` they do have it on return, and sample nothing. Returns metrics.
        """
        stale, outdated, stats = self.config.algorithm.max_staleness > 0, version != self.version, {}
        self.turns.sample(pushing=outdated)
        if outdated or now:
            with self.phase("rollout"):
                resting = self.ahead.rest(step, now=now)
                if stale and not self.together(resting, "rollouts beside the update"):
                    return stats
        if outdated:
            with self.phase("weight_sync"):
                self.push(version)
            stats["weight_syncs"] = 1  # it was verified, or push would have raised
            if stale:  # the rollouts themselves come too late to prove it
                with self.phase("engine_check"):
                    stats |= self.check(len(self.service.urls) if self.service else 0, PROBE_TOKENS)
        self.ahead.served = Served(step, version)
        return stats

    def together(self, value: Any, what: str) -> Any:
        """The main process's `value` on every process; the others may wait for it as long as it takes."""
        with watchdog.waiting(what) if self.source is None else nullcontext():
            return parallel.broadcast(value)

    def push(self, version: int) -> None:
        """Send the policy's weights to the engines as `version`."""
        report = weight_sync.push(self.policy.hf_weights(), self.service, version=version)
        if report is not None and not report.verified:
            raise RuntimeError(f"weight sync {version}: a rollout server does not report the new version; see its log")
        self.version = version

    def probes(self, count: int = NUM_PROBES) -> list[list[int]]:
        """The same few histories on every process, for checks."""
        return parallel.broadcast(self.source.probes(count) if self.source is not None else None)

    def check(self, count: int = NUM_PROBES, length: int | None = None) -> dict[str, float]:
        """Stop unless engines and trainer give the same logprobs on the first tokens of the expert's own turns.

        Returns:
            The gap on the main process; nothing elsewhere, or when asked to leave meanwhile.
        """
        rows = [row[:length] for row in self.probes(count)]
        scored = [logprobs.tolist() for logprobs in self.policy.score(rows)]
        if self.source is not None:
            with suppress(preemption.Preempted):  # for all ranks together behind it
                limit = self.config.rollout.max_mean_logprob_gap
                gap = weight_sync.check_logprobs(self.source.sampler.client, rows, scored, max_mean_gap=limit)
                return {"engine_gap": gap.mean, "engine_gap_max": gap.max}
        return {}

    def _prove(self) -> None:
        found = self.check()
        if found:
            gap, largest = found["engine_gap"], found["engine_gap_max"]
            print(f"engine check (policy version {self.version}): mean |logprob gap| {gap:.1e}, max {largest:.1e}", flush=True)
        preemption.leave_if_agreed("nothing new to save")
