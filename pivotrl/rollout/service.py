"""Starts, watches and stops the vLLM servers of one run, and keeps them on the newest policy weights."""

import atexit
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from pivotrl import preemption, watchdog
from pivotrl.config import RolloutConfig
from pivotrl.rollout import command
from pivotrl.rollout.server import Server, address, each, free_port
from pivotrl.rollout.transport import Pushed, make_transport

if TYPE_CHECKING:
    import torch

PORT_RETRIES = 3
STOP_GRACE_S = 10.0
POLL_S = 0.2
# vLLM's sleep levels: the weights go to host memory and come back from there, or they are forgotten and must be loaded again
LIGHT_SLEEP, DEEP_SLEEP = 1, 2


class RolloutService:
    """The rollout engines of one run: `with RolloutService(...) as service: service.wait_ready()`.

    Entering starts config.num_servers servers without waiting, so that the trainer can be built meanwhile. With config.urls
    it attaches to running servers and starts or stops nothing. Logs go to log_dir/server_<i>.log.

    A server is in rotation while it is `ready`. One that fails and then does not answer, or reports another policy version, leaves it;
    a thread restarts it (or waits for it, when it is not ours), gives it the current weights, and puts it back. The run goes on with
    the others. `on_event(name, values)` hears of server_down, server_up and server_lost, from any thread.

    Raises:
        ValueError: the configuration cannot work with this model.
    """

    worker_extension = command.WORKER_EXTENSION

    def __init__(self, config: RolloutConfig, model_path: Path, log_dir: Path, *, seed: int):
        self.config, self.model_path, self.log_dir, self.seed = config, Path(model_path), Path(log_dir), seed
        command.check(config)
        self.max_model_tokens = 0 if config.urls else command.max_model_tokens(config, self.model_path)
        self.transport = make_transport(config, self.log_dir)
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda event, values: None
        self._asleep = 0  # the level at which the servers sleep
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._repairs: list[threading.Thread] = []
        # no proxies: they have no way to our servers; no kept connections: vLLM resets them after an error
        self._http = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
        self._servers = [Server(i, self._http, address(url)) for i, url in enumerate(config.urls)]

    @property
    def urls(self) -> list[str]:
        """Base addresses; a server that was restarted has a new one."""
        return [server.url for server in self._servers]

    @property
    def num_restarts(self) -> int:
        return sum(server.total.restarts for server in self._servers)

    @property
    def version(self) -> int | None:
        """The policy version that every server in rotation holds; None before the first weight sync."""
        return self.transport.version

    def __enter__(self) -> "RolloutService":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Launch the servers and return at once; a second call does nothing. ValueError where this machine cannot do it."""
        with self._lock:
            if self._servers:
                return
            command.check_device(self.config)
            self.log_dir.mkdir(parents=True, exist_ok=True)
            atexit.register(self.close)
            logs = [self.log_dir / f"server_{i}.log" for i in range(self.config.num_servers)]
            self._servers = [Server(i, self._http, log_path=log) for i, log in enumerate(logs)]
            for server in self._servers:
                self._launch(server)

    def wait_ready(self) -> None:
        """Block until every server has answered once, telling stderr about it every ten seconds; afterwards, until one is in rotation.

        Returns early when the process was asked to leave.

        Raises:
            RuntimeError: a server process ended, or all servers were given up (shows the end of a log), or they sleep.
            TimeoutError: config.startup_timeout_s went by.
        """
        if self._asleep:
            raise RuntimeError("the rollout servers sleep: call wake(), or push weights, before they are asked")
        with self._lock:
            self.start()
            starting = [server for server in self._servers if not server.ready and not server.proved_at]
            started = told = time.monotonic()
            while waiting := [server for server in starting if not self._has_started(server)]:
                watchdog.beat("start of the rollout servers")
                elapsed = time.monotonic() - started
                if preemption.requested():
                    return
                if elapsed > self.config.startup_timeout_s:
                    names = ", ".join(str(server.log_path or self.config.urls[server.index]) for server in waiting)
                    raise TimeoutError(f"no answer after {elapsed:.0f} s (rollout.startup_timeout_s) from {names}")
                if time.monotonic() - told >= 10:
                    told = time.monotonic()
                    print(f"rollout: {len(waiting)} of {len(self._servers)} servers still starting, {elapsed:.0f} s", file=sys.stderr)
                time.sleep(POLL_S)
            if starting:
                print(f"rollout: {len(self._servers)} servers ready, waited {time.monotonic() - started:.1f} s", file=sys.stderr)
        while self.route(0) is None and not preemption.requested():  # a thread is bringing one back
            watchdog.beat("return of a rollout server")
            time.sleep(POLL_S)

    def route(self, key: int, avoid: Server | None = None) -> Server | None:
        """The server in rotation for a routing key, so that a trajectory's prefixes are cached there; None while there is none.

        A server that is away hands its keys out evenly and gets the same ones back. `avoid` is taken only when it is the only one.

        Raises:
            RuntimeError: all servers were given up; says why.
        """
        count = len(self._servers)
        order = sorted(self._servers, key=lambda server: (server.index != key % count, zlib.crc32(f"{key} {server.index}".encode())))
        ready = [server for server in order if server.ready]
        if not ready and all(server.lost for server in self._servers):
            raise RuntimeError(self._servers[0].lost)
        return next((server for server in ready if server is not avoid), ready[0] if ready else None)

    def failed(self, server: Server, sent_at: float, why: str) -> None:
        """A request sent at `sent_at` (time.monotonic) failed: look whether the server still serves, and take it down if not."""
        with server.lock:
            server.total.failures += 1
            if not server.ready or server.proved_at > sent_at:
                return  # an earlier look has answered this
            if self._serves(server):
                server.proved_at = time.monotonic()
            else:
                self._take_down(server, why)

    def ensure_alive(self) -> None:
        """Look at every server in rotation, take down those that do not serve, and wait until all are back or given up.

        Raises:
            RuntimeError: all servers were given up; shows the end of a log.
        """
        self.wait_ready()
        for server in self._servers:
            with server.lock:
                if server.ready and not self._serves(server):
                    self._take_down(server, "it does not answer")
        for repair in list(self._repairs):
            repair.join()
        self.route(0)

    def load_weights(self, weights: Iterable[tuple[str, "torch.Tensor"]], *, version: int) -> Pushed:
        """Put the weights into every server in rotation and forget cached prefixes; the others get them before they return. Servers that
        sleep are woken, the weights' memory first, the cache's when the weights are there. See `Transport.push`.

        Raises:
            ValueError, RuntimeError: the weights were refused, the message says why; those before them are the current ones still.
        """
        if not self._asleep:
            self.wait_ready()
        with self._lock:
            pushed: list[Pushed] = []

            def push(servers: list[Server]) -> dict[int, str]:
                pushed.append(self.transport.push(weights, version, servers))
                return pushed[0].problems

            self._load(push)
        self.wait_ready()
        return pushed[0]

    def sleep(self) -> None:
        """Colocated servers give their GPU memory to the trainer, until `load_weights` or `wake`; others do nothing. Call it while no
        request is in flight. A server that dies meanwhile is started again when the others wake."""
        if not self.config.colocated or self._asleep:
            return
        self.wait_ready()
        for repair in list(self._repairs):
            repair.join()  # a server that starts takes memory, too
        with self._lock:
            self._asleep = LIGHT_SLEEP if self.version is None else DEEP_SLEEP
            self._try(lambda server: server.sleep(self._asleep, timeout_s=self.config.request_timeout_s))

    def wake(self) -> None:
        """Wake servers that sleep, with the weights that they had; without `sleep` before, nothing."""
        if not self._asleep:
            return
        with self._lock:
            self._load(self.transport.load if self._asleep == DEEP_SLEEP else lambda servers: {})
        self.wait_ready()

    def reported_versions(self) -> list[int]:
        """The policy version that each server in rotation itself reports; 0 before the first weight sync."""
        found = []
        for server in self._servers:
            try:
                found += [server.version()] if server.ready else []
            except httpx.TransportError as error:
                self._take_down(server, f"{type(error).__name__} {error}")
        return found

    def take_metrics(self) -> list[dict[str, Any]]:
        """Each server's url and what it did since the last call."""
        return [{"url": server.url, **vars(server.take_load())} for server in self._servers]

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes on every server in rotation.

        Raises:
            RuntimeError: a server has requests in flight.
        """
        for server in self._servers:
            if server.ready:
                server.reset_prefix_cache()

    def close(self) -> None:
        """Stop the servers that this object started and delete its weight files; a second call does nothing."""
        self._closed.set()
        for repair in list(self._repairs):
            repair.join()
        with self._lock:
            atexit.unregister(self.close)
            for server in self._servers:
                server.terminate()
            for server in self._servers:
                server.stop(grace_s=STOP_GRACE_S)
            self.transport.close()
            self._servers = []
            self._http.close()

    def command(self, server_index: int, port: int) -> list[str]:
        """The command line of one server."""
        seed, extension = self.seed + server_index, self.worker_extension
        return command.server_command(self.config, self.model_path, port=port, seed=seed, extension=extension)

    def environment(self, server_index: int) -> dict[str, str]:
        """The environment of one server."""
        return command.server_environment(self.config, server_index, os.environ)

    def _launch(self, server: Server) -> None:
        port = free_port()
        server.launch(self.command(server.index, port), port, self.environment(server.index))

    def _load(self, load: Callable[[list[Server]], dict[int, str]]) -> None:
        """Have `load` put weights into all servers in rotation, asleep or not; those that fail leave it and are repaired."""
        asleep, timeout_s = self._asleep, self.config.request_timeout_s
        if asleep:
            self._try(lambda server: server.wake("weights", timeout_s=timeout_s))
        self._fill(load, [server for server in self._servers if server.ready])
        if asleep:
            self._try(lambda server: server.wake("kv_cache", timeout_s=timeout_s))
        if (version := self.version) is not None:
            self._try(lambda server: server.confirm(version))
        self._asleep = 0
        for server in self._servers if asleep else []:
            if not server.ready and not server.lost:  # it died in its sleep
                self._repair(server)

    def _fill(self, load: Callable[[list[Server]], dict[int, str]], servers: list[Server]) -> None:
        try:
            problems = load(servers)
        except (RuntimeError, ValueError) as error:
            for server in servers:
                if not self._serves(server):  # it lost its old weights and got no others
                    self._take_down(server, str(error), keep=True)
            raise
        for server in servers:
            if server.index in problems:
                self._take_down(server, problems[server.index], keep=True)

    def _try(self, call: Callable[[Server], None]) -> None:
        """`call` for all servers in rotation; those that do not answer leave it. Raises RuntimeError when one refuses."""
        servers = [server for server in self._servers if server.ready]
        problems = each(servers, call)
        for server in servers:
            if server.index in problems:
                self._take_down(server, problems[server.index])

    def _has_started(self, server: Server) -> bool:
        """Whether a starting server is in rotation; puts it there, with the current weights, as soon as it answers."""
        if server.ready:
            return True
        if server.ended:
            log = server.log_tail()
            if "address already in use" not in log.lower() or server.port_retries >= PORT_RETRIES:
                assert server.process is not None
                raise RuntimeError(f"a rollout server ended with code {server.process.returncode}; end of {server.log_path}:\n{log}")
            server.port_retries += 1
            server.stop(grace_s=0.0)
            self._launch(server)
            return False
        if not server.own:
            server.url = address(self.config.urls[server.index])  # it may have come back elsewhere
        if not server.healthy():
            return False
        with self._lock:
            if (version := self.version) is not None:
                if problem := self.transport.load([server]).get(server.index):
                    raise RuntimeError(problem)
                server.confirm(version)
            server.proved_at = time.monotonic()
            server.ready = True
        return True

    def _serves(self, server: Server) -> bool:
        """Whether it answers and holds the current weights: one that others restarted in between would not."""
        if server.ended or not any(server.healthy() for _ in range(3)):
            return False
        try:
            return self.version is None or server.version() == self.version
        except (RuntimeError, httpx.TransportError):
            return False

    def _take_down(self, server: Server, why: str, *, keep: bool = False) -> None:
        """Out of rotation at once; a thread brings it back. `keep`: its process may be well, only its weights are not."""
        server.ready = False
        self._tell("server_down", server, why)
        if self._asleep:  # the memory is the trainer's now
            server.stop(grace_s=0.0)
        else:
            self._repair(server, keep=keep)

    def _repair(self, server: Server, *, keep: bool = False) -> None:
        repair = threading.Thread(target=self._bring_back, args=(server, keep), name=f"repair-{server.index}", daemon=True)
        self._repairs = [thread for thread in self._repairs if thread.is_alive()] + [repair]
        repair.start()

    def _bring_back(self, server: Server, keep: bool) -> None:
        """Restart a server of our own, as often as rollout.max_restarts allows, or wait for somebody else's, until it serves."""
        problem = ""
        keep = keep and not server.ended and server.healthy()
        while not self._closed.is_set() and not preemption.requested():
            if server.own and not keep:
                if server.total.restarts >= self.config.max_restarts:
                    server.lost = (
                        f"a rollout server died {server.total.restarts + 1} times (rollout.max_restarts {self.config.max_restarts})"
                        f"{problem and '; ' + problem}; end of {server.log_path}:\n{server.log_tail()}"
                    )
                    break
                server.stop(grace_s=0.0)
                server.total.restarts += 1
                self._launch(server)
            keep = False
            problem = self._await(server)
            if not problem:
                return self._tell("server_up", server, f"policy version {self.version or 0} verified")
            if not server.own:
                server.lost = f"rollout server {self.config.urls[server.index]} is not ours to restart and did not come back: {problem}"
                break
        if server.lost:
            self._tell("server_lost", server, server.lost)

    def _await(self, server: Server) -> str:
        """Wait until the server is back in rotation; empty, or why it is not after rollout.startup_timeout_s."""
        deadline, problem = time.monotonic() + self.config.startup_timeout_s, "no answer"
        while time.monotonic() < deadline and not self._closed.is_set() and not preemption.requested():
            try:
                if self._has_started(server):
                    return ""
            except (RuntimeError, httpx.TransportError) as error:
                problem = str(error)
                if server.own:
                    return problem
            time.sleep(POLL_S)
        return f"{problem} (rollout.startup_timeout_s={self.config.startup_timeout_s:g})"

    def _tell(self, event: str, server: Server, why: str) -> None:
        verb = {"server_down": "restarting" if server.own else "waiting for", "server_up": "back:", "server_lost": "given up:"}[event]
        print(f"rollout: {verb} {server.url} (server {server.index}): {why}", file=sys.stderr, flush=True)
        self.on_event(event, {"server": server.index, "url": server.url, "why": why})
