"""The rollout service: vLLM servers (`service`), the client that samples from them (`client`), and the weight receiver
that runs inside them (`receiver`, the only module that imports vllm). Here stands what sender and receiver agree on."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightFile:
    """One set of policy weights on disk: a safetensors file with Hugging Face names, and `tensor_checksum` of every tensor."""

    path: Path
    version: int
    checksums: dict[str, int]


def tensor_checksum(tensor: "torch.Tensor") -> int:
    """CRC-32 of a contiguous CPU tensor's bytes."""
    import torch

    return zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
