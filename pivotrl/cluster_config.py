"""Typed options of the machines that a run uses (cluster) and of what tools/plan.py assumes of them (plan)."""

from dataclasses import dataclass, field


@dataclass
class ClusterConfig:
    """Where Slurm runs it, and what one GPU can do (tools/plan.py): peak dense TFLOP/s, and GB/s of its memory and links.

    `nodes` train. `rollout_nodes` more of the same allocation serve rollouts; then `network_rollout` must be true: servers listen on
    all addresses of their nodes, where everybody in that network can use them, and replace their weights.
    Slurm signals a job `save_s` seconds before `time_limit`. `sbatch_options` are added as they are, such as `--mem=0`.
    Jobs run in `container_image`, with `container_mounts` (SOURCE:TARGET), by srun's pyxis plugin or by `apptainer`; None: on the host.
    `python` is the interpreter there.
    """

    name: str = "local"
    nodes: int = 1
    gpus_per_node: int = 0
    rollout_nodes: int = 0
    network_rollout: bool = False
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    save_s: int = 300
    sbatch_options: list[str] = field(default_factory=list)
    python: str = ".venv/bin/python"
    container_image: str | None = None
    container_mounts: list[str] = field(default_factory=list)
    apptainer: bool = False
    gpu_memory_gib: float = 80.0
    bf16_tflops: float = 989.0
    fp8_tflops: float = 1979.0
    memory_gb_s: float = 3350.0
    nvlink_gb_s: float = 450.0
    network_gb_s: float = 50.0


@dataclass
class PlanConfig:
    """What tools/plan.py assumes; docs/sizing.md names the source of each number. None of it changes a run.

    Data: mean tokens of a history and of an action, the share of groups with variance (others cost nothing), tokens on the
    fullest expert rank over the mean. Machine: shares of peak reached by training, prefill (FLOPs), decode (memory bandwidth)
    and collectives (links); GiB of CUDA context and NCCL a GPU; share of memory lost to fragmentation; GB/s of a weight sync.
    """

    mean_prompt_tokens: int = 4500
    mean_action_tokens: int = 512
    signal_share: float = 1.0
    expert_imbalance: float = 1.25
    sustained_fraction: float = 0.28
    prefill_fraction: float = 0.4
    decode_fraction: float = 0.6
    link_fraction: float = 0.7
    context_gib: float = 2.0
    fragmentation: float = 0.06
    weight_sync_gb_s: float = 2.0
