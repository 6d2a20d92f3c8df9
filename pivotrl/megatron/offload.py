"""Room on the device while the policy does not train: gradients are freed, the optimizer's state waits in host memory, weights stay.

Megatron's own `offload_to_cpu` of an optimizer gives fp32 parameters new memory, after which the optimizer would step on copies that
the model does not see. Here a tensor keeps its identity, as in Megatron's gradient buffers: only its storage is emptied and filled again.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pivotrl.megatron.optimizer import parts


class HostMemory:
    """Where the training state of one policy waits. `chunks` are its DDP-wrapped model chunks."""

    def __init__(self, chunks: Sequence[Any], optimizer: Any):
        self.chunks, self.optimizer = chunks, optimizer
        self._copies: list[tuple[Tensor, Tensor]] = []  # (tensor, its copy), as `state_tensors` gave them the last time
        self.away = False

    def offload(self) -> None:
        """Empty the storages; a second call does nothing. Until `reload` neither gradients nor optimizer state may be touched."""
        if self.away:
            return
        cuda, tensors = torch.cuda.is_available(), list(state_tensors(self.optimizer))
        for chunk in self.chunks:
            chunk.offload_grad_buffers(synchronize=cuda, empty_cache=False)
        copies = [copy for _, copy in self._copies]  # pinning memory takes longer than filling it
        if [(copy.shape, copy.dtype) for copy in copies] != [(tensor.shape, tensor.dtype) for tensor in tensors]:
            copies = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]
        self._copies = list(zip(tensors, copies, strict=True))
        for tensor, copy in self._copies:
            copy.copy_(tensor)
            tensor.untyped_storage().resize_(0)
        if cuda:
            torch.cuda.empty_cache()
        self.away = True

    def reload(self) -> None:
        """Everything back in its place, gradients as zeros; a second call does nothing."""
        if not self.away:
            return
        for chunk in self.chunks:
            chunk.restore_grad_buffers(synchronize=torch.cuda.is_available())
        for tensor, copy in self._copies:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            tensor.copy_(copy)
        self.away = False


@torch.no_grad()
def state_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Moments and master copies that own their memory: fp32 parameters are views of the weights, and offloaded parts lie in host memory."""
    for inner in parts(optimizer):
        if inner.config.optimizer_cpu_offload:
            continue
        masters = [main for group in inner.shard_fp32_from_float16_groups for main in group if main is not None]
        state = [value for entry in inner.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
        for tensor in (*masters, *state):
            if tensor.numel() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
                yield tensor.detach()
