"""The typed schema of every run. YAML under conf/ holds choices; this file holds fields, types and meanings.

Hydra merges conf/ and the command line onto these dataclasses, so a typo fails at once with the field's name.
Nothing heavy is imported here: `--help` and `--cfg job` must answer in under two seconds.
"""

import dataclasses
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


@dataclass
class ModelConfig:
    """Shape of a Qwen3 (dense, num_experts 0) or Qwen3-MoE policy; `hf_path` is a folder with weights and tokenizer."""

    name: str = MISSING
    hf_path: str | None = None
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    head_dim: int = MISSING
    ffn_hidden_size: int = MISSING
    num_experts: int = 0
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True
    tie_embeddings: bool = False
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_positions: int = 40960
    init_std: float = 0.02


@dataclass
class DomainConfig:
    """source + verifier + environment. Counts are tasks; tasks are split before anything else happens."""

    name: str = MISSING
    source: str = MISSING
    verifier: str = MISSING
    environment: str | None = None
    data_path: str | None = None
    system_prompt: bool = True
    num_heldout_tasks: int = 0
    num_warmup_tasks: int = 0
    num_train_tasks: int | None = None
    verifier_timeout_s: float = 10.0
    verifier_workers: int = 1
    max_result_rows: int = 10_000


class SelectionRule(StrEnum):
    """mixed: var > 0 and mean < max_mean (the paper). keep_all_zero: also mean == 0. random: control of mixed's size."""

    mixed = "mixed"
    keep_all_zero = "keep_all_zero"
    random = "random"


@dataclass
class ProfileConfig:
    """K samples per candidate from the frozen policy, and the rule that keeps pivots."""

    num_samples: int = 16
    max_candidates: int | None = None
    max_mean: float = 0.6
    rule: SelectionRule = SelectionRule.mixed


@dataclass
class RolloutConfig:
    """The vLLM rollout service. With `urls` the recipe attaches to running servers; without, it starts its own.

    `gpus` are the CUDA devices of own servers (num_servers * tensor_parallel of them; empty: the visible ones in order).
    `weights_dir` must be visible to the servers; None: shared memory for own servers, the run folder for attached ones.
    """

    urls: list[str] = field(default_factory=list)
    num_servers: int = 1
    tensor_parallel: int = 1
    gpus: list[int] = field(default_factory=list)
    weights_dir: str | None = None
    dtype: str = "float32"
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    max_prompt_tokens: int = 15_000
    max_sequences: int = 256
    max_inflight: int = 64
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.85
    enforce_eager: bool = True
    startup_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    max_restarts: int = 3
    max_mean_logprob_gap: float = 1e-3


class AdvantageKind(StrEnum):
    group = "group"
    leave_one_out = "leave_one_out"


class LossLevel(StrEnum):
    token = "token"
    sequence = "sequence"


@dataclass
class AlgorithmConfig:
    """GRPO over pivots. Defaults are the known settings of the paper's conversational run."""

    num_steps: int = 100
    pivots_per_step: int = 64
    group_size: int = 16
    updates_per_step: int = 1
    advantage: AdvantageKind = AdvantageKind.group
    advantage_eps: float = 1e-6
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_beta: float = 0.0
    loss_level: LossLevel = LossLevel.token
    importance_cap: float | None = 5.0
    checkpoint_every: int = 50


@dataclass
class OptimizerConfig:
    """Adam as Megatron runs it; warm-up is linear, then constant or cosine to min_lr."""

    lr: float = 1e-6
    min_lr: float | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    freeze_router: bool = False


@dataclass
class SftConfig:
    """Supervised warm-up: expert turns of the warm-up tasks plus a mixture of unrelated skills."""

    split: str = "warmup"
    num_steps: int = 100
    tokens_per_step: int = 8192
    skill_share: float = 0.25
    train_tokenizer: bool = False
    checkpoint_every: int = 200
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class ParallelConfig:
    """Megatron layout; data parallelism is what is left of the processes that torchrun started.

    `processes` asks recipes/run_pipeline.py for more processes than the layout needs: 2 alone is data parallelism of two.
    """

    processes: int | None = None
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    recompute: str = "none"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass
class PrecisionConfig:
    """Compute precision; the router and the main gradients stay in fp32."""

    name: str = "fp32"
    params: str = "fp32"
    fp8: str | None = None
    fp8_recipe: str = "tensorwise"


@dataclass
class BatchingConfig:
    """Rows of packed tokens. With shared_prefix a history stands once in a row, followed by its group's actions.

    At start one group is computed both ways; a gap stops the run, or with fall_back_to_dense turns sharing off.
    """

    max_row_tokens: int = 16_384
    shared_prefix: bool = True
    fall_back_to_dense: bool = False


@dataclass
class EvaluationConfig:
    """Held-out measurements. Temperature 0 is greedy."""

    policies: list[str] = field(default_factory=list)
    temperature: float = 0.0
    max_tasks: int | None = None
    max_turns: int = 40
    max_pivot_candidates: int | None = 200
    pivot_samples: int = 4
    skill_examples: int = 50


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass
class ClusterConfig:
    """Where Slurm runs it."""

    name: str = "local"
    nodes: int = 1
    gpus_per_node: int = 0


class OnChange(StrEnum):
    """What a stage does when its inputs or config differ from the ones its finished or half-finished output was made from."""

    refuse = "refuse"
    restart = "restart"
    accept = "accept"


@dataclass
class Config:
    """One run = one folder: run_dir. Stages find their inputs there unless a path is given under `inputs`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    domain: DomainConfig = field(default_factory=DomainConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run_name: str = "default"
    run_dir: str = "runs/${run_name}"
    candidates_path: str = "${run_dir}/candidates"
    profiles_path: str = "${run_dir}/profiles"
    pivots_path: str = "${run_dir}/pivots"
    seed: int = 0
    dry_run: bool = False
    on_change: OnChange = OnChange.refuse


def register() -> None:
    """Put the schema where conf/config.yaml finds it; it must come first in every composition."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def typed(composed: DictConfig) -> Config:
    """The composed configuration as checked dataclasses.

    Raises:
        omegaconf.errors.OmegaConfBaseException: unknown key, wrong type or missing value; names the field.
    """
    # Merged onto the schema once more: `+group.typo=1` on the command line gets past Hydra's first merge.
    plain = OmegaConf.to_container(composed, resolve=False)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    return config


def compose(*overrides: str) -> Config:
    """What a recipe started with these overrides would get."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return typed(hydra_compose("config", overrides=list(overrides)))


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested dicts, for manifests and YAML."""
    return dataclasses.asdict(config)


def run_recipe(stage: str, main: Callable[[Config], None]) -> None:
    """The body of every recipe: compose, check, and run `main`, or say what it would do with dry_run=true.

    A user's mistake (ValueError, FileNotFoundError) ends with its one sentence; the traceback goes to error.log in the run folder.
    """
    import hydra

    register()

    @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
    def entry(composed: DictConfig) -> None:
        try:
            config = typed(composed)
        except OmegaConfBaseException as error:
            sys.exit(f"{stage}: {error}")
        if config.dry_run:
            from pivotrl.stages import describe

            print(describe(stage, config))
            return
        try:
            main(config)
        except (ValueError, FileNotFoundError) as error:
            log = Path(config.run_dir) / "error.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(traceback.format_exc())
            sys.exit(f"{stage}: {error}\n(traceback in {log})")

    entry()
