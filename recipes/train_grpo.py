"""GRPO over pivots: Megatron trains, vLLM rolls out, the domain's verifier rewards."""

from pathlib import Path

from pivotrl import preemption
from pivotrl.config import Config
from pivotrl.recipe import run_recipe


@preemption.handled("train_grpo")
def main(config: Config) -> None:
    from pivotrl import diagnostics, groups, grpo, training
    from pivotrl.megatron import parallel
    from pivotrl.metrics import read
    from pivotrl.records import read_jsonl
    from pivotrl.stages import open_stage, run_path
    from pivotrl.types import Pivot

    main_process = training.start(config)
    with open_stage("train_grpo", config, writes=main_process) as stage:
        if stage.done:
            return print(f"training is already done: {run_path(config, 'checkpoints/grpo')}")
        with training.prepared("train_grpo", config) as run:
            every = read_jsonl(Path(config.pivots_path) / "pivots.jsonl", Pivot)
            pivots = groups.usable(every, config.rollout.max_prompt_tokens)
            source = groups.PivotGroups(config, run.sampler, pivots) if run.sampler is not None else None
            trainer = grpo.Trainer(config, run.policy, source, run.log)
            trainer.start(run.version)
            trainer.train(run.start)
        if main_process:
            stage.count(over_long_pivots=len(every) - len(pivots), **diagnostics.totals(read(Path(config.run_dir), "train_grpo")))
    parallel.stop()


if __name__ == "__main__":
    run_recipe("train_grpo", main)
