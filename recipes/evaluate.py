"""Held-out pivot reward, end-to-end task success and the out-of-domain skills, for each policy."""

from pivotrl import preemption
from pivotrl.config import Config
from pivotrl.recipe import run_recipe


@preemption.handled("evaluate")
def main(config: Config) -> None:
    from pivotrl.evaluation import benchmark
    from pivotrl.local_rollouts import open_sampler
    from pivotrl.stages import open_stage, policies, run_path

    with open_stage("evaluate", config) as stage:
        if stage.done:
            return print(f"evaluations are already in {config.run_dir}/evaluation")
        for label, path in policies(config).items():
            with open_sampler(config, path) as sampler:
                result = benchmark.evaluate(config, sampler, run_path(config, "evaluation") / label)
            print(
                label,
                ", ".join(f"{name} {result[name]:.3f}" for name in ("pivot_reward", "task_success", "out_of_domain") if name in result),
            )


if __name__ == "__main__":
    run_recipe("evaluate", main)
