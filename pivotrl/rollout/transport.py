"""How weights get into the servers: the interface, and the way through a file. The other way is `broadcast`."""

import atexit
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pivotrl.config import RolloutConfig, WeightTransport
from pivotrl.rollout import TensorInfo, dtype_name, tensor_checksum
from pivotrl.rollout.server import Server, each
from pivotrl.rollout.weights_folder import WeightsFolder

if TYPE_CHECKING:
    import torch

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Pushed:
    """What was sent, and the servers (by index) that did not take all of it, with what is known of the reason."""

    tensors: tuple[TensorInfo, ...]
    problems: dict[int, str]


class Transport(Protocol):
    """Puts the weights of one version after the other into servers, and keeps the newest for servers that come back.

    Both methods leave it to the caller to confirm the servers' versions, and to take those with problems out of rotation.
    """

    @property
    def version(self) -> int | None:
        """The newest version that was pushed; None before the first."""
        ...

    def push(self, weights: Iterable[tuple[str, "torch.Tensor"]], version: int, servers: Sequence[Server]) -> Pushed:
        """Read `weights` to the end and put them into the servers. When it raises, the weights before are the newest still.

        Raises:
            ValueError: a name came twice.
            RuntimeError: the weights are not what a server needs; the message names the tensor.
        """
        ...

    def load(self, servers: Sequence[Server]) -> dict[int, str]:
        """Put the newest weights into servers that lack them; returns the problems by server index. Errors as in `push`."""
        ...

    def close(self) -> None:
        """Let go of the newest weights; a second call does nothing."""
        ...


def make_transport(config: RolloutConfig, log_dir: Path) -> Transport:
    """The transport that rollout.weight_transport names."""
    if config.weight_transport == WeightTransport.broadcast:
        from pivotrl.rollout.broadcast import BroadcastTransport

        return BroadcastTransport(config)
    return FileTransport(config, log_dir)


@dataclass(frozen=True)
class WeightFile:
    """One set of policy weights on disk: a safetensors file with Hugging Face names."""

    path: Path
    version: int
    tensors: tuple[TensorInfo, ...]


class FileTransport:
    """One safetensors file a version, in config.weights_dir, else in shared memory, or in the log folder for attached servers, which may
    run on other nodes. Every server reads it and checks it in full before its model is touched. The newest file stays."""

    def __init__(self, config: RolloutConfig, log_dir: Path):
        self.config, self.log_dir = config, log_dir
        self._file: WeightFile | None = None
        self._folder: WeightsFolder | None = None

    @property
    def version(self) -> int | None:
        return self._file.version if self._file else None

    def push(self, weights: Iterable[tuple[str, "torch.Tensor"]], version: int, servers: Sequence[Server]) -> Pushed:
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in weights:
            if name in tensors:
                raise ValueError(f"weight {name!r} came twice: yield every Hugging Face name once")
            tensors[name] = tensor.detach().cpu().contiguous()
        return self.push_file(self.write(tensors, version), servers)

    def write(self, tensors: dict[str, "torch.Tensor"], version: int) -> WeightFile:
        """The file of a version; one that is written again gets a file of its own."""
        from safetensors.torch import save_file

        path = self.path(version)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, path)
        infos = (TensorInfo(name, dtype_name(t), tuple(t.shape), tensor_checksum(t)) for name, t in tensors.items())
        return WeightFile(path, version, tuple(infos))

    def push_file(self, file: WeightFile, servers: Sequence[Server]) -> Pushed:
        """Put `file` into the servers. It then belongs to us: it goes with the next one, or at once when it is refused."""
        previous, self._file = self._file, file
        try:
            problems = self.load(servers)
        except RuntimeError:
            self._file = previous
            file.path.unlink(missing_ok=True)
            raise
        if previous:
            previous.path.unlink(missing_ok=True)
        return Pushed(file.tensors, problems)

    def load(self, servers: Sequence[Server]) -> dict[int, str]:
        assert self._file is not None, "nothing was pushed yet"
        return each(servers, self._load)

    def close(self) -> None:
        if self._folder:
            self._folder.close()
        self._folder = self._file = None

    def path(self, version: int) -> Path:
        """Where to write the weights of a version."""
        if self._folder is None:
            shared = self.config.weights_dir or (SHARED_MEMORY if SHARED_MEMORY.is_dir() and not self.config.urls else self.log_dir)
            self._folder = WeightsFolder(Path(shared))
            atexit.register(self.close)
        return self._folder.path(version)

    def _load(self, server: Server) -> None:
        file, timeout_s = self._file, self.config.request_timeout_s
        assert file is not None
        checksums = {info.name: info.checksum for info in file.tensors}
        server.start_update(timeout_s=timeout_s)
        server.update({"path": str(file.path.resolve()), "checksums": checksums}, timeout_s=timeout_s)
        server.finish_update(file.version, timeout_s=timeout_s)
