"""Weights in flat buffers of bounded size: packed by the sender, checked and taken apart by the receivers."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pivotrl.rollout import REFUSED, TensorInfo, dtype_name, tensor_checksum

# every tensor begins at a multiple of this many bytes, so that its view has a lawful address whatever came before it
ALIGNMENT = 16
# CRC-32 does about 2.5 GB/s a thread, without Python's lock
CHECKSUM_THREADS = 4


@dataclass(frozen=True)
class Bucket:
    """Tensors one behind the other in a flat uint8 buffer; `flat` lies in host memory at the sender."""

    tensors: tuple[TensorInfo, ...]
    flat: torch.Tensor


def pack(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """Copy `weights` as they come into buckets of at most `max_bytes` in host memory; a larger tensor has one to itself.

    Raises:
        ValueError: a name came twice.
    """
    seen: set[str] = set()
    placed: list[tuple[str, torch.Tensor]] = []
    flat, used = torch.empty(0, dtype=torch.uint8), 0
    for name, tensor in weights:
        if name in seen:
            raise ValueError(f"weight {name!r} came twice: yield every Hugging Face name once")
        seen.add(name)
        end = used + _aligned(tensor.nbytes)
        if end > len(flat):
            if placed:
                yield _bucket(placed, flat[:used])
            placed, used, end = [], 0, _aligned(tensor.nbytes)
            flat = torch.empty(max(max_bytes, end), dtype=torch.uint8)
        place = _view(flat, used, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
        place.copy_(tensor.detach())
        placed.append((name, place))
        used = end
    if placed:
        yield _bucket(placed, flat[:used])


def unpack(flat: torch.Tensor, tensors: Sequence[TensorInfo]) -> list[tuple[str, torch.Tensor]]:
    """(name, view into `flat`) of every tensor, on the device of `flat`."""
    views, start = [], 0
    for info in tensors:
        views.append((info.name, _view(flat, start, info.nbytes, getattr(torch, info.dtype), info.shape)))
        start += _aligned(info.nbytes)
    return views


def num_bytes(tensors: Sequence[TensorInfo]) -> int:
    """How long the bucket of these tensors is."""
    return sum(_aligned(info.nbytes) for info in tensors)


def verify(flat: torch.Tensor, tensors: Sequence[TensorInfo]) -> None:
    """Raises ValueError naming the first tensor whose bytes are not the sender's."""
    views = unpack(flat.cpu(), tensors)
    for info, checksum in zip(tensors, _checksums(view for _, view in views), strict=True):
        if checksum != info.checksum:
            raise ValueError(f"{REFUSED} checksum of {info.name} differs from what the sender sent")


def _bucket(placed: list[tuple[str, torch.Tensor]], flat: torch.Tensor) -> Bucket:
    checksums = _checksums(tensor for _, tensor in placed)
    infos = zip(placed, checksums, strict=True)
    return Bucket(tuple(TensorInfo(name, dtype_name(tensor), tuple(tensor.shape), checksum) for (name, tensor), checksum in infos), flat)


def _checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        return list(pool.map(tensor_checksum, tensors))


def _view(flat: torch.Tensor, start: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return flat[start : start + nbytes].view(dtype).view(shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
