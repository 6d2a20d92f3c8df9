"""The rollout service: vLLM servers (`service`), the client that samples from them (`client`), the two ways that weights take
to them (`transport`, `broadcast`), and the receiver inside them (`receiver`). vLLM is imported in `receiver`, and in
`process_group` on CUDA. Here stands what sender and receiver agree on."""

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A server whose update was begun and not ended reports this instead of a version, so that nobody takes it for a good one.
UPDATING = "updating"
# How a receiver's message begins when its data are wrong, and when it was left alone: then the fault lies with another member.
REFUSED = "weights refused:"
LEFT_ALONE = "weight broadcast broke off:"


@dataclass(frozen=True)
class TensorInfo:
    """What both ends know of a tensor: Hugging Face name, torch dtype ("float32"), shape and `tensor_checksum`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: int

    @property
    def nbytes(self) -> int:
        import torch

        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def tensor_checksum(tensor: "torch.Tensor") -> int:
    """CRC-32 of a contiguous CPU tensor's bytes."""
    import torch

    return zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def dtype_name(tensor: "torch.Tensor") -> str:
    """ "float32" for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")
