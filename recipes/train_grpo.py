"""GRPO over pivots: Megatron trains, vLLM rolls out, the domain's verifier rewards."""

from contextlib import ExitStack
from pathlib import Path

from pivotrl import preemption
from pivotrl.config import Config
from pivotrl.recipe import run_recipe


@preemption.handled("train_grpo")
def main(config: Config) -> None:
    from pivotrl import diagnostics, groups, grpo, watchdog
    from pivotrl.local_rollouts import open_sampler
    from pivotrl.megatron import checkpoint, kernels, parallel
    from pivotrl.megatron.policy import Policy
    from pivotrl.metrics import MetricsLog, read
    from pivotrl.records import read_jsonl
    from pivotrl.stages import initial_policy, open_stage, run_path
    from pivotrl.types import Pivot

    grpo.check(config)
    kernels.check(config)
    parallel.start(config.parallel, config.seed)
    main_process = parallel.is_main()
    if main_process:
        print(kernels.line(config), flush=True)
    with open_stage("train_grpo", config, writes=main_process) as stage, ExitStack() as stack:
        if stage.done:
            return print(f"training is already done: {run_path(config, 'checkpoints/grpo')}")
        stack.enter_context(watchdog.watching(config.watchdog, Path(config.run_dir), rank=parallel.rank()))
        sampler = stack.enter_context(open_sampler(config, initial_policy(config))) if main_process else None
        policy = Policy(config, config.optimizer, num_steps=config.algorithm.num_steps)
        policy.load_hf(initial_policy(config))
        checkpoint.start_from(policy, config.checkpoint)
        if config.algorithm.kl_beta > 0:
            policy.snapshot_reference()
        start, version = checkpoint.resume(policy, run_path(config, "checkpoints/grpo"))
        log = (
            stack.enter_context(MetricsLog(Path(config.run_dir), "train_grpo", config.logging, resume_step=start)) if main_process else None
        )
        every = read_jsonl(Path(config.pivots_path) / "pivots.jsonl", Pivot)
        pivots = groups.usable(every, config.rollout.max_prompt_tokens)
        source = groups.PivotGroups(config, sampler, pivots) if sampler is not None else None
        trainer = grpo.Trainer(config, policy, source, log)
        trainer.start(version)
        trainer.train(start)
        if main_process:
            stage.count(over_long_pivots=len(every) - len(pivots), **diagnostics.totals(read(Path(config.run_dir), "train_grpo")))
    parallel.stop()


if __name__ == "__main__":
    run_recipe("train_grpo", main)
