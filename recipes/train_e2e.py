"""End-to-end RL: GRPO over whole episodes in the domain's environment, which rewards them."""

from pathlib import Path

from pivotrl import preemption
from pivotrl.config import Config
from pivotrl.recipe import run_recipe


@preemption.handled("train_e2e")
def main(config: Config) -> None:
    from pivotrl import diagnostics, e2e, grpo, training
    from pivotrl.megatron import parallel
    from pivotrl.metrics import read
    from pivotrl.stages import open_stage, run_path

    e2e.check(config)
    main_process = training.start(config)
    with open_stage("train_e2e", config, writes=main_process) as stage:
        if stage.done:
            return print(f"training is already done: {run_path(config, 'checkpoints/grpo')}")
        with training.prepared("train_e2e", config) as run:
            source = e2e.EpisodeGroups(config, run.sampler, e2e.load_tasks(config)) if run.sampler is not None else None
            trainer = grpo.Trainer(config, run.policy, source, run.log)
            trainer.start(run.version)
            trainer.train(run.start)
        if main_process:
            stage.count(**diagnostics.totals(read(Path(config.run_dir), "train_e2e")))
    parallel.stop()


if __name__ == "__main__":
    run_recipe("train_e2e", main)
