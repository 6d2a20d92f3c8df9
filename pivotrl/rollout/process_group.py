"""The process group of a weight broadcast: the trainer's main process as rank 0, and every worker of every vLLM server.

It stands beside the default groups that trainer and engines have of their own. On CUDA it is vLLM's NCCL communicator, elsewhere
gloo. Members find each other through a store that rank 0 opens. Every wait here ends by a timeout.
"""

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from pivotrl.rollout import LEFT_ALONE

POLL_S = 0.001
# gloo ends its own wait at the timeout; only when it does not, we do
GRACE_S = 5.0


class BrokenGroup(RuntimeError):
    """A member is gone, hangs or gave up. The group is of no use any more."""


def transfer_device() -> torch.device:
    """Where buckets travel from and to: this process's GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def address_towards(url: str) -> str:
    """The address of this machine that a server at `url` can reach."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing, only chooses the way
        return probe.getsockname()[0]


class Group:
    """One member's end of the group. Construct it on all members at once; `address` is this machine's, towards the others."""

    def __init__(self, store: dist.Store, rank: int, size: int, *, device: torch.device, address: str, timeout_s: float):
        self.rank, self.size, self.device, self.timeout_s = rank, size, device, timeout_s
        make = _Nccl if device.type == "cuda" else _Gloo
        try:
            self._backend = make(store, rank, size, device=device, address=address, timeout_s=timeout_s)
        except RuntimeError as error:
            raise BrokenGroup(f"{LEFT_ALONE} {error}") from error

    def broadcast(self, flat: torch.Tensor, given_up: Callable[[], bool] = lambda: False) -> None:
        """Send `flat` (uint8) from rank 0, fill it elsewhere. `given_up` is asked all the while whether another member will never come.

        Raises:
            BrokenGroup: it did not go through within timeout_s; afterwards the group is closed.
        """
        started, why = time.monotonic(), ""
        try:
            done = self._backend.begin(flat)
            while not done():
                if given_up() and self._backend.can_abort:
                    why = "another member gave up"
                elif time.monotonic() - started > self.timeout_s + GRACE_S:
                    why = f"no answer within {self.timeout_s:g} s"
                if why:
                    break
                time.sleep(POLL_S)
        except RuntimeError as error:
            why = str(error)
        if why:
            self.close()
            raise BrokenGroup(f"{LEFT_ALONE} {why}")

    def close(self) -> None:
        """Leave; the others' broadcasts fail."""
        self._backend.close()


class _Gloo:
    can_abort = False  # it waits for every member that lives, up to the timeout

    def __init__(self, store: dist.Store, rank: int, size: int, *, device: torch.device, address: str, timeout_s: float):
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroupGloo | None = dist.ProcessGroupGloo(store, rank, size, options)

    def begin(self, flat: torch.Tensor) -> Callable[[], bool]:
        assert self._group is not None, "the group was closed"
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        work = self._group.broadcast([flat], options)

        def done() -> bool:
            if not work.is_completed():
                return False
            work.wait()  # raises what went wrong
            return True

        return done

    def close(self) -> None:
        self._group = None  # its connections go with it


class _Nccl:
    can_abort = True

    def __init__(self, store: dist.Store, rank: int, size: int, *, device: torch.device, address: str, timeout_s: float):
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        with unpinned_nccl_env():  # vLLM's own NCCL settings would not be the trainer's
            self._communicator = PyNcclCommunicator(StatelessProcessGroup(rank, size, store), device)
        if self._communicator.disabled:
            raise RuntimeError("vLLM finds no NCCL library")
        self._stream = torch.cuda.Stream(device)

    def begin(self, flat: torch.Tensor) -> Callable[[], bool]:
        if self._communicator.disabled:
            raise RuntimeError("the group was closed")
        self._stream.wait_stream(torch.cuda.current_stream(flat.device))
        self._communicator.broadcast(flat, src=0, stream=self._stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event.query

    def close(self) -> None:
        self._communicator.destroy()


class Meeting:
    """Rank 0's side of the rendezvous: open the store, have the others told `invitation`, then `join`."""

    def __init__(self, size: int, *, timeout_s: float):
        self.size, self.timeout_s = size, timeout_s
        self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))

    def invitation(self, url: str, rank_offset: int) -> dict:
        """What the server at `url`, whose workers are the ranks from `rank_offset` on, must know."""
        return {
            "host": address_towards(url),
            "port": self._store.port,
            "rank_offset": rank_offset,
            "world_size": self.size,
            "timeout_s": self.timeout_s,
        }

    def join(self, address: str, given_up: Callable[[], bool]) -> Group:
        """The group, once all have come. Raises BrokenGroup when one does not, or `given_up` says that it will not."""
        deadline = time.monotonic() + self.timeout_s
        here = [f"here/{rank}" for rank in range(1, self.size)]
        while not self._store.check(here):
            if given_up() or time.monotonic() > deadline:
                raise BrokenGroup(f"{LEFT_ALONE} not all members came to the rendezvous")
            time.sleep(POLL_S)
        self._store.set("begin", "1")
        store = dist.PrefixStore("group", self._store)
        return Group(store, 0, self.size, device=transfer_device(), address=address, timeout_s=self.timeout_s)


def accept(invitation: dict, worker: int, device: torch.device) -> Group:
    """A worker's side: come to the meeting as rank `rank_offset` + `worker`. Raises BrokenGroup when it fails."""
    host, rank, timeout_s = invitation["host"], invitation["rank_offset"] + worker, invitation["timeout_s"]
    try:
        store = dist.TCPStore(host, invitation["port"], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        store.set(f"here/{rank}", "1")
        store.get("begin")  # without it one that died on the way would leave the others waiting inside NCCL, which has no timeout
    except RuntimeError as error:
        raise BrokenGroup(f"{LEFT_ALONE} {error}") from error
    address = address_towards(f"http://{host}:{invitation['port']}")
    prefixed = dist.PrefixStore("group", store)
    return Group(prefixed, rank, invitation["world_size"], device=device, address=address, timeout_s=timeout_s)
