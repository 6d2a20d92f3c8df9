"""The typed schema of every run. YAML under conf/ holds choices; this file holds fields, types and meanings.

Hydra merges conf/ and the command line onto these dataclasses (pivotrl/recipe.py), so a typo fails at once with the field's name.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from pivotrl.cluster_config import ClusterConfig, PlanConfig
from pivotrl.verifier_config import VerificationConfig


class Dtype(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


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
    """source + verifier + environment. Counts are tasks; tasks are split before anything else happens.

    `warmup_overlooked`: the share of repairs that whoever made the warm-up trajectories leaves out, so that pi_0 knows what to do
    and often does not do it (sources that make their trajectories: tau2_telecom).
    """

    name: str = MISSING
    source: str = MISSING
    verifier: str = MISSING
    verification: VerificationConfig = field(default_factory=VerificationConfig)
    environment: str | None = None
    data_path: str | None = None
    system_prompt: bool = True
    num_heldout_tasks: int = 0
    num_warmup_tasks: int = 0
    warmup_overlooked: float = 0.0
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
    """K samples per candidate from the frozen policy, and the rule that keeps pivots.

    With num_shards > 1 a process profiles the trajectories of its `shard` only; without `shard` it joins the finished shards.
    With `refresh` training profiles and selects anew, with the policy as it is, when the mean deviation of rewards inside groups falls
    under refresh_fraction of what it was at the start (or after the last refresh). Both are means over `refresh_window` steps, and two
    windows at least lie between refreshes; each costs num_samples turns for every candidate.
    """

    num_samples: int = 16
    max_candidates: int | None = None
    shard: int | None = None
    num_shards: int = 1
    max_mean: float = 0.6
    rule: SelectionRule = SelectionRule.mixed
    refresh: bool = False
    refresh_fraction: float = 1 / 3
    refresh_window: int = 5


class WeightTransport(StrEnum):
    """How weights reach the servers: a file that all see, or a broadcast from the trainer (NCCL between GPUs, gloo between CPUs)."""

    file = "file"
    broadcast = "broadcast"


@dataclass
class RolloutConfig:
    """The vLLM rollout service. With `urls` the recipe attaches to running servers; without, it starts its own.

    An entry of `urls` is an address, or the path of a file that holds it and is read again while the server is away.
    `max_inflight` bounds the requests at all servers together. `max_restarts` is per server of our own; `startup_timeout_s` also
    bounds the wait for an attached server that is away.
    `gpus` are the CUDA devices of own servers (num_servers * tensor_parallel of them; empty: the visible ones in order).
    `weights_dir` must be visible to the servers; None: shared memory for own servers, the run folder for attached ones.
    `bucket_mib` is how much one broadcast carries. `colocated`: own servers share the trainer's GPUs, and sleep while it trains.
    """

    urls: list[str] = field(default_factory=list)
    num_servers: int = 1
    tensor_parallel: int = 1
    gpus: list[int] = field(default_factory=list)
    weights_dir: str | None = None
    weight_transport: WeightTransport = WeightTransport.file
    bucket_mib: float = 256.0
    colocated: bool = False
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
    """GRPO over pivots. Defaults are the known settings of the paper's conversational run.

    With max_staleness > 0 the engines sample up to so many steps ahead while the policy trains; no step trains on rollouts of a policy
    that is older by more versions. importance_cap then corrects for the difference.
    """

    num_steps: int = 100
    pivots_per_step: int = 64
    group_size: int = 16
    updates_per_step: int = 1
    max_staleness: int = 0
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
    """Adam as Megatron runs it; warm-up is linear, then constant or cosine to min_lr.

    `precision_aware` keeps Adam's moments as `moments` says (Transformer Engine's fused Adam); `offload_fraction` of the
    optimizer's state lives and steps in host memory.
    """

    lr: float = 1e-6
    min_lr: float | None = None
    warmup_steps: int = 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_grad: float = 1.0
    freeze_router: bool = False
    precision_aware: bool = False
    moments: Dtype = Dtype.fp32
    offload_fraction: float = 0.0


@dataclass
class E2eConfig:
    """End-to-end RL: algorithm.group_size whole episodes of each of `tasks_per_step` tasks a step, on the trajectories' tasks of `split`.

    An episode ends after `max_turns` actions, or where its history exceeds rollout.max_prompt_tokens; it then has the environment's reward.
    """

    split: str = "train"
    tasks_per_step: int = 8
    max_turns: int = 40


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


class Recompute(StrEnum):
    """What the backward pass computes again instead of keeping: nothing, attention, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


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
    recompute: Recompute = Recompute.none
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class Fp8Recipe(StrEnum):
    """Transformer Engine's scaling: one factor a tensor from the tensor itself, from its history, or one a block of 128."""

    tensorwise = "tensorwise"
    delayed = "delayed"
    blockwise = "blockwise"


@dataclass
class PrecisionConfig:
    """Compute precision. The router is fp32 always; `main_grads` is what gradients are summed in over microbatches and ranks.

    `fp8` runs the layers' matrix products in FP8 on top of bf16 `params`.
    """

    name: str = "fp32"
    params: Dtype = Dtype.fp32
    main_grads: Dtype = Dtype.fp32
    fp8: Fp8Recipe | None = None


class LayerSpec(StrEnum):
    """auto: Transformer Engine's layers where it is installed and there is a GPU, Megatron's local ones elsewhere."""

    auto = "auto"
    local = "local"
    transformer_engine = "transformer_engine"


class Dispatcher(StrEnum):
    """How tokens travel to their experts: NCCL all-to-all, or DeepEP's kernels (Megatron's flex dispatcher)."""

    alltoall = "alltoall"
    deepep = "deepep"


@dataclass
class KernelsConfig:
    """Which kernels compute. Fused rope and router widen the gap to the rollout engine's logprobs, so they are off."""

    layers: LayerSpec = LayerSpec.auto
    grouped_gemm: bool = True
    fused_rope: bool = False
    fused_router: bool = False
    dispatcher: Dispatcher = Dispatcher.alltoall


@dataclass
class CheckpointConfig:
    """Checkpoints of training. `load_from` starts from a Megatron checkpoint of another run or of tools/convert_checkpoint.py.

    `keep_best` keeps the highest scores besides `keep_last` (reward_mean, or lowest loss in SFT). A checkpoint without optimizer
    state is refused unless `without_optimizer` says that moments may start at zero.
    """

    asynchronous: bool = False
    keep_last: int = 2
    keep_best: int = 0
    load_from: str | None = None
    without_optimizer: bool = False


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
    """Held-out measurements. Temperature 0 is greedy. `every_steps` > 0: also so often during training, on the engines as they are."""

    policies: list[str] = field(default_factory=list)
    temperature: float = 0.0
    max_tasks: int | None = None
    max_turns: int = 40
    max_pivot_candidates: int | None = 200
    pivot_samples: int = 4
    skill_examples: int = 50
    every_steps: int = 0


@dataclass
class WatchdogConfig:
    """A training process without progress for `timeout_s` seconds writes its threads' stacks to run_dir/logs/rank_<r>.stacks and ends
    with exit code 86. It must exceed the longest phase: one update, one checkpoint, one finished group. 0: no watchdog."""

    timeout_s: float = 3600.0


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    wandb_project: str | None = None


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
    e2e: E2eConfig = field(default_factory=E2eConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    run_name: str = "default"
    run_dir: str = "runs/${run_name}"
    candidates_path: str = "${run_dir}/candidates"
    profiles_path: str = "${run_dir}/profiles"
    pivots_path: str = "${run_dir}/pivots"
    seed: int = 0
    dry_run: bool = False
    on_change: OnChange = OnChange.refuse
