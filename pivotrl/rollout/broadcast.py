"""Weights from the trainer's main process to all servers at once, bucket by bucket through a process group of their own.

While one bucket travels and is loaded, the next is gathered. The sender keeps the buckets in host memory: servers that
failed on the way, and servers that come back later, get the whole set again from there.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import httpx

from pivotrl import watchdog
from pivotrl.config import RolloutConfig
from pivotrl.rollout import LEFT_ALONE, REFUSED, UPDATING, TensorInfo
from pivotrl.rollout.server import Server, no_answer
from pivotrl.rollout.transport import Pushed

if TYPE_CHECKING:
    import torch

    from pivotrl.rollout.buckets import Bucket
    from pivotrl.rollout.process_group import Group

# what a rendezvous or one bucket may take; rollout.request_timeout_s can only shorten it
MAX_TIMEOUT_S = 120.0
# how often a broadcast that breaks without anybody to blame is tried again
MAX_BLAMELESS = 2


class Broken(Exception):
    """An update did not get through. `problems`: the servers (by index) at fault, none when that cannot be told."""

    def __init__(self, problems: dict[int, str], why: str = ""):
        super().__init__("; ".join(problems.values()) or why)
        self.problems = problems


class BroadcastTransport:
    """The `Transport` over NCCL (on CUDA) or gloo."""

    def __init__(self, config: RolloutConfig):
        self.config = config
        self.timeout_s = min(config.request_timeout_s, MAX_TIMEOUT_S)
        self._version: int | None = None
        self._kept: list[Bucket] = []
        self._group: Group | None = None
        self._members: list[int] = []

    @property
    def version(self) -> int | None:
        return self._version

    def push(self, weights: Iterable[tuple[str, "torch.Tensor"]], version: int, servers: Sequence[Server]) -> Pushed:
        from pivotrl.rollout.buckets import pack

        kept: list[Bucket] = []
        known = {info.name: info for bucket in self._kept for info in bucket.tensors}
        stream = self._keep(pack(weights, int(self.config.bucket_mib * 2**20)), kept, known)
        if not known:  # the first time nobody knows what will come: gather it all, so that servers can refuse it before they lose theirs
            known = {info.name: info for bucket in stream for info in bucket.tensors}
        problems = self._reach(servers, version, kept, stream, known)
        self._version, self._kept = version, kept
        return Pushed(tuple(info for bucket in kept for info in bucket.tensors), problems)

    def load(self, servers: Sequence[Server]) -> dict[int, str]:
        assert self._version is not None, "nothing was pushed yet"
        self._leave()  # a server that came back is a new member even where its index is not
        known = {info.name: info for bucket in self._kept for info in bucket.tensors}
        return self._reach(servers, self._version, self._kept, iter(()), known)

    def close(self) -> None:
        self._leave()
        self._kept, self._version = [], None

    def _keep(self, buckets: Iterable["Bucket"], kept: list["Bucket"], known: dict[str, TensorInfo]) -> Iterator["Bucket"]:
        """The buckets, each put into `kept` first; RuntimeError as soon as they are not the tensors that the last push had."""
        names: set[str] = set()
        for bucket in buckets:
            for info in bucket.tensors:
                before = known.get(info.name, None if known else info)
                if before is None or (before.dtype, before.shape) != (info.dtype, info.shape):
                    had = f"was {before.dtype} {before.shape}" if before else "was not there"
                    raise RuntimeError(f"{REFUSED} {info.name} is {info.dtype} {info.shape} and {had} in the push before")
                names.add(info.name)
            kept.append(bucket)
            watchdog.beat(f"weight sync, bucket {len(kept)}")
            yield bucket
        if missing := sorted(known.keys() - names):
            raise RuntimeError(f"{REFUSED} missing names {missing}, which the push before had")

    def _reach(
        self, servers: Sequence[Server], version: int, kept: list["Bucket"], stream: Iterator["Bucket"], known: dict[str, TensorInfo]
    ) -> dict[int, str]:
        """Send what is `kept` and what the `stream` adds to it, until all servers have everything that are not at fault."""
        problems: dict[int, str] = {}
        blameless = 0
        source: Iterable[Bucket] = [*kept] if kept else stream
        while left := [server for server in servers if server.index not in problems]:
            try:
                self._deliver(source, left, version, known)
                break
            except Broken as broken:
                blameless += not broken.problems
                problems |= broken.problems or ({s.index: str(broken) for s in left} if blameless > MAX_BLAMELESS else {})
            deque(stream, maxlen=0)  # gathering is collective: go through with it, whoever is left
            source = kept
        deque(stream, maxlen=0)
        return problems

    def _deliver(self, buckets: Iterable["Bucket"], servers: list[Server], version: int, known: dict[str, TensorInfo]) -> None:
        """One update of all these servers. Raises Broken, or RuntimeError when a server wants other tensors and nothing was sent."""
        with ExitStack() as on_failure, ThreadPoolExecutor(1, "weight-sender") as sender:
            on_failure.callback(self._leave)
            self._join(servers)
            manifest = [[info.name, info.dtype, info.shape] for info in known.values()]
            self._ask(servers, lambda server: self._begin(server, manifest))
            travelling: Future[None] | None = None
            for number, bucket in enumerate(buckets):
                if travelling:
                    travelling.result()
                travelling = sender.submit(self._send, number, bucket, servers)
            if travelling:
                travelling.result()
            self._ask(servers, lambda server: server.finish_update(version, timeout_s=self.config.request_timeout_s))
            on_failure.pop_all()

    def _begin(self, server: Server, manifest: list[list]) -> None:
        server.start_update(timeout_s=self.config.request_timeout_s, abandon=False)
        server.update({"manifest": manifest}, timeout_s=self.config.request_timeout_s)
        server.request("POST", "/update_weight_version", {"new_version": UPDATING})

    def _send(self, number: int, bucket: "Bucket", servers: list[Server]) -> None:
        """One bucket to all servers; returns when all have loaded it."""
        from pivotrl.rollout.process_group import BrokenGroup

        assert self._group is not None
        tensors = [[info.name, info.dtype, info.shape, info.checksum] for info in bucket.tensors]
        body = {"bucket": number, "tensors": tensors}
        why = ""
        with ThreadPoolExecutor(len(servers)) as pool:
            # a member ends its own wait first, so that only one that hangs is found silent
            asked = {server.index: pool.submit(server.update, body, timeout_s=2 * self.timeout_s) for server in servers}
            try:
                self._group.broadcast(bucket.flat.to(self._group.device), _watch(servers, asked))
            except BrokenGroup as error:
                why = str(error)
        self._judge(servers, asked, why, damaged=True)

    def _join(self, servers: list[Server]) -> None:
        """Have these servers, and no others, in the group. Raises Broken."""
        from pivotrl.rollout.process_group import BrokenGroup, Meeting, address_towards

        if self._group and self._members == [server.index for server in servers]:
            return
        self._leave()
        workers = self._num_workers(servers)
        meeting, offset, why = Meeting(1 + sum(workers), timeout_s=self.timeout_s), 1, ""
        with ThreadPoolExecutor(len(servers)) as pool:
            asked = {}
            for server, count in zip(servers, workers, strict=True):
                asked[server.index] = pool.submit(self._invite, server, meeting.invitation(server.url, offset))
                offset += count
            try:
                self._group = meeting.join(address_towards(servers[0].url), _watch(servers, asked))
            except BrokenGroup as error:
                why = str(error)
                del meeting  # closes the store: whoever waits there is told
        self._judge(servers, asked, why)
        self._members = [server.index for server in servers]

    def _num_workers(self, servers: list[Server]) -> list[int]:
        found: dict[int, int] = {}

        def ask(server: Server) -> None:
            found[server.index] = server.request("GET", "/get_world_size")["world_size"]

        self._ask(servers, ask)
        return [found[server.index] for server in servers]

    def _invite(self, server: Server, invitation: dict) -> None:
        server.request("POST", "/collective_rpc", {"method": "abandon_weight_update"}, timeout_s=2 * self.timeout_s)
        server.request("POST", "/init_weight_transfer_engine", {"init_info": invitation}, timeout_s=2 * self.timeout_s)

    def _leave(self) -> None:
        if self._group:
            self._group.close()
        self._group, self._members = None, []

    def _ask(self, servers: list[Server], call: Callable[[Server], None]) -> None:
        """`call` for all at the same time. Raises Broken, or RuntimeError where a server wants other tensors."""
        with ThreadPoolExecutor(len(servers)) as pool:
            asked = {server.index: pool.submit(call, server) for server in servers}
        self._judge(servers, asked, "")

    @staticmethod
    def _judge(servers: list[Server], asked: dict[int, Future[Any]], why: str, *, damaged: bool = False) -> None:
        """Raises Broken unless everything went well: at fault is who did not answer, or complains of something else than the others.

        With `damaged`, a refusal is a fault on the way to this one server; otherwise RuntimeError, the weights are no good for any.
        """
        problems = {}
        for server in servers:
            try:
                asked[server.index].result()
            except httpx.TransportError as error:
                problems[server.index] = no_answer(server, error)
            except RuntimeError as error:
                if REFUSED in str(error) and not damaged:
                    raise
                why = why or str(error)
                if LEFT_ALONE not in str(error):
                    problems[server.index] = str(error)
        if problems or why:
            raise Broken(problems, why)


def _watch(servers: list[Server], asked: dict[int, Future[Any]]) -> Callable[[], bool]:
    """Whether a request failed, so that its server will not come to the broadcast."""

    def failed() -> bool:
        away = [server for server in servers if asked[server.index].done() and asked[server.index].exception() is not None]
        for server in away:
            if server.ended:
                server.stop(grace_s=0.0)  # its engine may outlive it, a member that keeps the others waiting
        return bool(away)

    return failed
