"""How one vLLM server is started: its command line, its environment, and what the configuration must satisfy first."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pivotrl.config import RolloutConfig, WeightTransport

WORKER_EXTENSION = "pivotrl.rollout.receiver.WorkerExtension"
# they would make the engine join the trainer's process group
TORCHRUN_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"}


def on_cuda() -> bool:
    """Whether this machine has a CUDA device."""
    import torch

    return torch.cuda.is_available()


def check(config: RolloutConfig) -> None:
    """Raises ValueError for settings that contradict each other, whatever the model is."""
    if config.bucket_mib <= 0:
        raise ValueError(f"rollout.bucket_mib={config.bucket_mib}: give MiB above 0")
    if config.colocated and config.urls:
        raise ValueError(
            "rollout.colocated=true is for servers of our own on the trainer's GPUs, rollout.urls is for servers of others: "
            "set one of the two"
        )
    if config.colocated and config.weight_transport == WeightTransport.broadcast:
        raise ValueError(
            "rollout.weight_transport=broadcast cannot serve rollout.colocated=true: NCCL takes one member a GPU, and trainer and server "
            "share theirs; set rollout.weight_transport=file"
        )


def check_device(config: RolloutConfig) -> None:
    """Raises ValueError where this machine's servers cannot sleep although they shall."""
    if config.colocated and not on_cuda():
        raise ValueError("rollout.colocated=true needs CUDA, vLLM's CPU build has no sleep mode: set rollout.colocated=false")


def max_model_tokens(config: RolloutConfig, model_path: Path) -> int:
    """The longest row that own servers serve: prompt, completion and, where the model has the position, one more to score.

    Raises:
        ValueError: the model or the number of GPUs does not fit the configuration.
    """
    wanted = config.max_prompt_tokens + config.max_new_tokens
    if config.num_servers < 1:
        raise ValueError(f"rollout.num_servers is {config.num_servers}; give at least 1, or rollout.urls to attach to servers")
    if config.gpus and len(config.gpus) != config.num_servers * config.tensor_parallel:
        needed = config.num_servers * config.tensor_parallel
        raise ValueError(f"rollout.gpus names {len(config.gpus)} devices; num_servers * tensor_parallel needs {needed}")
    if not (model_path / "config.json").is_file():
        raise ValueError(f"{model_path} is no Hugging Face model folder: it has no config.json")
    positions = json.loads((model_path / "config.json").read_text())["max_position_embeddings"]
    if wanted > positions:
        raise ValueError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {wanted}, but the model has {positions} positions: lower one"
        )
    return min(wanted + 1, positions)  # one more, so that a full row can be scored


def server_command(config: RolloutConfig, model_path: Path, *, port: int, seed: int, extension: str = WORKER_EXTENSION) -> list[str]:
    """The command line of one server."""
    max_tokens = max_model_tokens(config, model_path)
    options: dict[str, object] = {
        "model": model_path,
        "served-model-name": "policy",
        "host": "127.0.0.1",
        "port": port,
        "dtype": config.dtype,
        "seed": seed % 2**31,
        "max-model-len": max_tokens,
        "max-num-seqs": config.max_sequences,
        "tensor-parallel-size": config.tensor_parallel,
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",  # sampling follows the request alone, not defaults in the model's folder
        "worker-extension-cls": extension,
        "weight-transfer-config": json.dumps({"backend": "pivotrl"}),
    }
    # scale-out opens the token-in-token-out route, the one that reports every sampled token's weight version
    flags = ["--enable-scale-out", "--disable-uvicorn-access-log", *(["--enforce-eager"] if config.enforce_eager else [])]
    if config.colocated:
        flags.append("--enable-sleep-mode")
    if config.tensor_parallel == 1:
        options["distributed-executor-backend"] = "uni"
    if on_cuda():
        options["gpu-memory-utilization"] = config.gpu_memory_utilization
    else:
        options["kv-cache-memory-bytes"] = int(config.kv_cache_gib * 2**30)
        # whole prompts only: vLLM 0.32 dies on CPU when a seeded request's prompt is split over two steps
        options["max-num-batched-tokens"] = max(max_tokens, 8192)
        flags.append("--no-enable-chunked-prefill")
    values = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", *values, *flags]


def server_environment(config: RolloutConfig, server_index: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of one server: `inherited` without what belongs to the trainer alone, and what vLLM needs."""
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [inherited.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # opens the routes for weights, prefix cache and sleep; who can reach the server can use them
    settings["VLLM_SERVER_DEV_MODE"] = "1"
    if on_cuda():
        size, visible = config.tensor_parallel, inherited.get("CUDA_VISIBLE_DEVICES", "")
        devices = config.gpus or (visible.split(",") if visible else range(config.num_servers * size))
        mine = list(devices)[server_index * size : (server_index + 1) * size]
        settings["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
    else:
        # Spinning OpenMP threads beside a busy trainer cost a factor of ten; compilation costs 20 s at the first request.
        settings |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {name: value for name, value in inherited.items() if name not in TORCHRUN_VARIABLES} | settings
