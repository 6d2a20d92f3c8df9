"""The trained checkpoint -> a Hugging Face folder that transformers and vLLM load, with its logprobs checked."""

from pivotrl.config import Config
from pivotrl.recipe import run_recipe


def main(config: Config) -> None:
    from pivotrl import export
    from pivotrl.megatron import checkpoint, parallel
    from pivotrl.megatron.policy import Policy
    from pivotrl.render import Renderer
    from pivotrl.stages import final_policy, initial_policy, open_stage, run_path
    from pivotrl.types import Message

    parallel.start(config.parallel, config.seed)
    with open_stage("export_hf", config, writes=parallel.is_main()) as stage:
        if stage.done:
            return print(f"already exported to {final_policy(config)}")
        policy = Policy(config, None)
        last = checkpoint.latest(run_path(config, "checkpoints/grpo"))
        if last is None:
            folder = run_path(config, "checkpoints/grpo")
            raise FileNotFoundError(f"no finished checkpoint in {folder}: run recipes/train_grpo.py or recipes/train_e2e.py")
        checkpoint.load(policy, last)
        renderer = Renderer.from_pretrained(initial_policy(config))
        export.write_hf(policy, final_policy(config), tokenizer_path=initial_policy(config), end_ids=renderer.stop_ids)
        prompts = [renderer.prompt([Message(role="user", content=text)], ()) for text in ("What does the status bar show?", "12+34=")]
        worst = export.check_export(policy, final_policy(config), prompts, tolerance=1e-4 if config.precision.params == "fp32" else 0.5)
        stage.count(max_logprob_difference=worst)
        if parallel.is_main():
            print(f"exported {last} to {final_policy(config)}; largest logprob difference to transformers {worst:.1e}")
    parallel.stop()


if __name__ == "__main__":
    run_recipe("export_hf", main)
