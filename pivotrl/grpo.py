"""GRPO over pivots: sample a group of actions per pivot, verify, and move the policy towards the better ones.

One step: pivots -> G rollouts each -> verdicts -> advantages -> rows -> Megatron update -> weights into the engines.
The main process samples, verifies and logs; every process of the layout takes part in the update. With algorithm.max_staleness > 0
the next steps are sampled beside the update (pivotrl/ahead.py).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from pivotrl import ahead, preemption, watchdog
from pivotrl.batching import Row, pack
from pivotrl.config import Config
from pivotrl.diagnostics import check_gap, normalised, speeds, staleness
from pivotrl.engines import Engines
from pivotrl.evaluation import benchmark
from pivotrl.groups import GroupSource, check_sharing
from pivotrl.loss import grpo_loss
from pivotrl.megatron import checkpoint
from pivotrl.megatron.policy import Policy
from pivotrl.metrics import MetricsLog, Timer, peak_rss_gib


def check(config: Config) -> None:
    """Raises ValueError for settings under which the loss would not mean what it says."""
    if config.rollout.top_p != 1.0 or config.rollout.temperature <= 0:
        raise ValueError(
            f"rollout.top_p={config.rollout.top_p}, rollout.temperature={config.rollout.temperature}: training needs top_p=1.0 "
            "and a temperature above 0, so that rollout logprobs and policy logprobs are of the same distribution"
        )
    if config.algorithm.group_size < 2:
        raise ValueError(f"algorithm.group_size={config.algorithm.group_size}: a group needs two samples at least to have an advantage")
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > config.batching.max_row_tokens:
        raise ValueError(
            f"batching.max_row_tokens={config.batching.max_row_tokens} must hold the longest prompt and action: {longest} tokens"
        )
    ahead.check(config.algorithm, colocated=config.rollout.colocated)


class Trainer:
    """Holds what a step needs; `source` (of the groups) and `log` exist on the main process only."""

    def __init__(self, config: Config, policy: Policy, source: GroupSource | None, log: MetricsLog | None):
        self.config, self.policy, self.source, self.log = config, policy, source, log
        self.version = self.step = 0
        self.timer = Timer()
        self.engines = Engines(config, policy, source, self.phase)
        if source is not None and log is not None:
            source.sampler.client.service.on_event = lambda event, values: log.event(self.step, event, values)

    def start(self, version: int) -> None:
        """Prove that the engines sample from the policy and that rows hold what they should, before anything depends on it."""
        self.version = version
        self.engines.start(version)
        if self.config.batching.shared_prefix:
            check_sharing(self.policy, self.engines.probes(), self.config)

    def train(self, start: int) -> None:
        """From step `start` to algorithm.num_steps. Asked to leave: end the step (or abandon its sampling), save, raise Preempted."""
        algorithm, folder = self.config.algorithm, Path(self.config.run_dir) / "checkpoints" / "grpo"
        saved, score = start, None
        sampling = self.engines.sampling(start, self.log.event if self.log is not None else lambda step, event, values: None)
        with checkpoint.Saver(self.policy, folder, self.config.checkpoint) as saver, sampling:
            for step in range(start, algorithm.num_steps):
                saver.check()
                self.step = step
                batch = self.batch(step)
                if batch is None:
                    if step > saved:
                        self.save(saver, step, score)
                    break
                minibatches, stats = batch
                score = stats["reward_mean"]
                stats |= self.update(minibatches, step, fresh=stats["staleness_max"] <= 0)
                self.version += bool(minibatches)
                leaving = preemption.agreed() and step + 1 < algorithm.num_steps
                if not leaving:  # the engines may be leaving too; started again, they get these weights first
                    stats |= self.engines.refresh(step + 1, self.version, now=self.evaluates(step))
                self.evaluate(step)
                if self.log is not None:
                    self.report(step, stats)
                if leaving or (step + 1) % algorithm.checkpoint_every == 0 or step + 1 == algorithm.num_steps:
                    self.save(saver, step + 1, score)
                    saved = step + 1
                if leaving:
                    break
            else:
                return
        raise preemption.Preempted(f"step {self.step + 1} of {algorithm.num_steps} was the last to begin, everything is saved")

    def save(self, saver: checkpoint.Saver, step: int, score: float | None) -> None:
        with self.phase("checkpoint"):
            self.engines.turns.train()
            saver.save(step, version=self.version, score=score)

    def update(self, minibatches: Sequence[list[Row]], step: int, *, fresh: bool) -> dict[str, float]:
        """One optimizer update for each minibatch; returns the metrics of the first. `fresh`: all rollouts are the present policy's."""
        if minibatches:
            self.engines.turns.train()
        with self.phase("logprobs"):
            for rows in minibatches:
                self.add_logprobs(rows)
        loss, temperature = partial(grpo_loss, algorithm=self.config.algorithm), self.config.rollout.temperature
        stats: dict[str, float] = {}
        for number, rows in enumerate(minibatches):
            with self.phase("update"):
                metrics = self.policy.train_step(rows, loss, temperature=temperature, step=step)
            if number == 0:
                if fresh:
                    check_gap(metrics, self.config.rollout.max_mean_logprob_gap, step=step)
                stats = normalised(metrics)
        return stats

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A timed part of the step, which the watchdog hears of."""
        watchdog.beat(f"step {self.step}, {name}")
        return self.timer(name)

    def batch(self, step: int) -> tuple[list[list[Row]], dict[str, float]] | None:
        """Every minibatch's rows and the step's statistics, on every process; None when asked to leave while sampling."""
        self.engines.turns.sample()
        with self.phase("rollout"):
            groups, seconds = self.engines.ahead.take(step)
        found = self.build(groups) if groups is not None else None
        if found is not None:
            found[1]["sampling_s"] = round(seconds, 4)
        return self.engines.together(found, f"step {step}, rollouts of the main process")

    def build(self, groups: Sequence[Any]) -> tuple[list[list[Row]], dict[str, float]]:
        """Rows of every minibatch (none for groups without signal), and the step's rollout statistics."""
        assert self.source is not None
        parts, batching = self.config.algorithm.updates_per_step, self.config.batching
        minibatches = []
        for part in range(parts):
            items = self.source.items(groups[part::parts])
            if items:
                minibatches.append(pack(items, max_row_tokens=batching.max_row_tokens, shared_prefix=batching.shared_prefix))
        stats = self.source.statistics(groups)
        stats["train_tokens"] = sum(len(row.token_ids_T) for rows in minibatches for row in rows)
        return minibatches, stats | staleness(self.version, self.source.versions(groups))

    def add_logprobs(self, rows: list[Row]) -> None:
        """Old logprobs where several updates share one batch, reference logprobs where a KL penalty wants them."""
        temperature = self.config.rollout.temperature
        if self.config.algorithm.updates_per_step > 1:
            for row, old in zip(rows, self.policy.logprobs(rows, temperature=temperature), strict=True):
                row.fields["old_logprobs"] = old
        if self.config.algorithm.kl_beta > 0:
            for row, ref in zip(rows, self.policy.logprobs(rows, temperature=temperature, reference=True), strict=True):
                row.fields["ref_logprobs"] = ref

    def evaluates(self, step: int) -> bool:
        every = self.config.evaluation.every_steps
        return every > 0 and (step + 1) % every == 0

    def evaluate(self, step: int) -> None:
        """Every evaluation.every_steps steps, held-out measurements on the engines as they are; one event line of metrics.jsonl."""
        if self.source is None or not self.evaluates(step) or preemption.requested():
            return
        with self.phase("evaluation"), suppress(preemption.Preempted):  # for all ranks together at the next step
            folder = Path(self.config.run_dir) / "rollouts" / f"evaluation_{step + 1:06d}"
            result = benchmark.evaluate(self.config, self.source.sampler, folder)
            if self.log is not None:
                self.log.event(step, "evaluation", result)

    def report(self, step: int, stats: dict[str, float]) -> None:
        """One row of metrics.jsonl and one line for the eye."""
        assert self.log is not None and self.source is not None
        client = self.source.sampler.client
        seconds = self.timer.take()
        stats |= seconds | speeds(stats, seconds)
        stats |= {"policy_version": self.version, "restarts": client.metrics.restarts, "peak_rss_gib": peak_rss_gib()}
        self.log.log(step, stats)
        self.log.event(step, "servers", {"servers": client.service.take_metrics()})
        show = ("reward_mean", "reward_std", "dead_group_share", "entropy", "logprob_gap")
        print(
            f"step {step + 1}/{self.config.algorithm.num_steps} " + " ".join(f"{k} {stats[k]:.3g}" for k in show if k in stats), flush=True
        )
