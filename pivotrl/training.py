"""What every training recipe sets up around its groups: processes, rollout servers, policy, checkpoint, log."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pivotrl import grpo, watchdog
from pivotrl.config import Config
from pivotrl.local_rollouts import Sampler, open_sampler
from pivotrl.megatron import checkpoint, kernels, parallel
from pivotrl.megatron.policy import Policy
from pivotrl.metrics import MetricsLog
from pivotrl.stages import initial_policy, run_path


@dataclass(frozen=True)
class Run:
    """A policy ready to train from finished step `start` on; `sampler` and `log` exist on the main process only."""

    policy: Policy
    sampler: Sampler | None
    log: MetricsLog | None
    start: int
    version: int


def start(config: Config) -> bool:
    """Check the settings and join the layout's processes; whether this is the main one.

    Raises:
        ValueError: settings under which the loss would not mean what it says, or whose kernels are missing.
    """
    grpo.check(config)
    kernels.check(config)
    parallel.start(config.parallel, config.seed)
    if parallel.is_main():
        print(kernels.line(config), flush=True)
    return parallel.is_main()


@contextmanager
def prepared(stage: str, config: Config) -> Iterator[Run]:
    """Rollout servers with pi_0 (on the main process) and the policy as its last checkpoint has it, or pi_0."""
    main_process = parallel.is_main()
    with ExitStack() as stack:
        stack.enter_context(watchdog.watching(config.watchdog, Path(config.run_dir), rank=parallel.rank()))
        sampler = stack.enter_context(open_sampler(config, initial_policy(config))) if main_process else None
        policy = Policy(config, config.optimizer, num_steps=config.algorithm.num_steps)
        policy.load_hf(initial_policy(config))
        checkpoint.start_from(policy, config.checkpoint)
        if config.algorithm.kl_beta > 0:
            policy.snapshot_reference()
        start, version = checkpoint.resume(policy, run_path(config, "checkpoints/grpo"))
        log = stack.enter_context(MetricsLog(Path(config.run_dir), stage, config.logging, resume_step=start)) if main_process else None
        yield Run(policy, sampler, log, start, version)
