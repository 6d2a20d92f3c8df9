"""One vLLM server: its process where it is ours, and the few routes of it that the service uses."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from pivotrl.rollout import UPDATING

HEALTH_TIMEOUT_S = 10.0
# A process of its own, so that a trainer killed with SIGKILL leaves no server behind. It looks at its parent's id instead
# of asking for a death signal, which would also fire when only the thread that started the server ends.
WATCHDOG = """
import os, signal, sys, time
parent, group = int(sys.argv[1]), int(sys.argv[2])
try:
    while os.getppid() == parent:
        os.killpg(group, 0)
        time.sleep(0.5)
    os.killpg(group, signal.SIGKILL)
except ProcessLookupError:
    pass
"""


def guard(process: subprocess.Popen) -> subprocess.Popen:
    """Start what kills `process`, the leader of a session, and its group when this process is gone; kill it when `process` has ended."""
    arguments = [sys.executable, "-I", "-S", "-c", WATCHDOG, str(os.getpid()), str(process.pid)]
    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True)


@dataclass
class Load:
    """What one server has done: answered requests, the tokens in them, the seconds they took, failed ones, its restarts."""

    requests: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failures: int = 0
    restarts: int = 0


@dataclass
class Server:
    """One vLLM server. `log_path`, `process` and `watchdog` are None for a server that somebody else runs.

    `ready`: it answers and holds the current weights, so it is in rotation. `lost`: why it was given up for good.
    """

    index: int
    http: httpx.Client
    url: str = ""
    log_path: Path | None = None
    process: subprocess.Popen | None = None
    watchdog: subprocess.Popen | None = None
    ready: bool = False
    lost: str = ""
    port_retries: int = 0
    proved_at: float = 0.0
    total: Load = field(default_factory=Load)
    reported: Load = field(default_factory=Load)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def own(self) -> bool:
        return self.log_path is not None

    @property
    def ended(self) -> bool:
        """Its process is ours and gone."""
        return self.process is not None and self.process.poll() is not None

    def take_load(self) -> Load:
        """What it did since the last call."""
        now = replace(self.total)
        since = {name: round(value - vars(self.reported)[name], 4) for name, value in vars(now).items()}
        self.reported = now
        return Load(**since)

    def launch(self, command: Sequence[str], port: int, environment: Mapping[str, str]) -> None:
        """Start the process, and return at once."""
        assert self.log_path is not None
        self.url, self.ready = f"http://127.0.0.1:{port}", False
        with open(self.log_path, "ab") as log:
            log.write(f"\n--- starting on port {port}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.watchdog = guard(self.process)

    def stop(self, *, grace_s: float) -> None:
        """End our process and everything below it; nothing for a server that is not ours."""
        if self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
            # also the engine processes below it, which can outlive it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.watchdog:
            self.watchdog.kill()
            self.watchdog.wait()
        self.process = self.watchdog = None

    def terminate(self) -> None:
        """Ask our process to end; `stop` then waits for it."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)

    def log_tail(self, num_lines: int = 30) -> str:
        """The end of its log since its last start, headed by the engine's own error, which other messages bury."""
        assert self.log_path is not None
        lines = self.log_path.read_text(errors="replace").rpartition("--- starting on port")[2].splitlines()
        causes = [line for line in lines[:-num_lines] if "(EngineCore" in line and "Error: " in line]
        return "\n".join(causes[-1:] + lines[-num_lines:])

    def healthy(self) -> bool:
        try:
            return self.http.get(f"{self.url}/health", timeout=HEALTH_TIMEOUT_S).status_code == 200
        except httpx.TransportError:
            return False

    def version(self) -> int:
        """The policy version that the server itself reports; 0 before the first weight sync, -1 when an update was broken off."""
        return parse_version(self.request("GET", "/weight_info")["weight_version"])

    def start_update(self, *, timeout_s: float, abandon: bool = True) -> None:
        """Open the model for new weights. `abandon`: an earlier update may have been broken off, perhaps by a trainer that died;
        vLLM would refuse the next one for ever."""
        if abandon:
            self.request("POST", "/collective_rpc", {"method": "abandon_weight_update"}, timeout_s=timeout_s)
        self.request("POST", "/start_weight_update", timeout_s=timeout_s)

    def update(self, update_info: dict, *, timeout_s: float) -> None:
        """One part of an update, in the receiver's words. Raises RuntimeError when the server refuses it."""
        self.request("POST", "/update_weights", {"update_info": update_info}, timeout_s=timeout_s)

    def finish_update(self, version: int, *, timeout_s: float) -> None:
        """The model is whole again and has a version."""
        self.request("POST", "/finish_weight_update", {"weight_version": str(version)}, timeout_s=timeout_s)

    def confirm(self, version: int) -> None:
        """Have it forget cached prefixes, and ask for its version.

        Raises:
            RuntimeError: it reports another version, or has requests in flight.
            httpx.TransportError: it does not answer.
        """
        self.reset_prefix_cache()
        if (reported := self.version()) != version:
            raise RuntimeError(f"{self.url} reports policy version {reported} after it was given {version}")

    def sleep(self, level: int, *, timeout_s: float) -> None:
        """Free its GPU memory; level 1 keeps the weights in host memory, level 2 forgets them."""
        self.request("POST", f"/sleep?level={level}", timeout_s=timeout_s)

    def wake(self, tag: str, *, timeout_s: float) -> None:
        """Allocate again what `tag` ("weights" or "kv_cache") names."""
        self.request("POST", f"/wake_up?tags={tag}", timeout_s=timeout_s)

    def reset_prefix_cache(self) -> None:
        """Raises RuntimeError while requests are in flight."""
        if not self.request("POST", "/reset_prefix_cache")["success"]:
            raise RuntimeError(f"{self.url} has requests in flight: sync weights and reset the prefix cache only between batches")

    def request(self, method: str, route: str, payload: dict | None = None, *, timeout_s: float = 60.0) -> dict:
        """One call; RuntimeError with the server's message when it refuses."""
        response = self.http.request(method, f"{self.url}{route}", json=payload, timeout=timeout_s)
        if response.is_error:
            raise RuntimeError(f"{method} {self.url}{route} failed with status {response.status_code}: {error_message(response)}")
        return response.json()


def each(servers: Sequence[Server], call: Callable[[Server], None]) -> dict[int, str]:
    """`call` for all servers at the same time. Index of every server that did not answer, and what was seen of it.

    Raises:
        RuntimeError: a server refused; its message says why.
    """
    if not servers:
        return {}
    problems = {}
    with ThreadPoolExecutor(len(servers)) as pool:
        for server, asked in [(server, pool.submit(call, server)) for server in servers]:
            try:
                asked.result()
            except httpx.TransportError as error:
                problems[server.index] = no_answer(server, error)
    return problems


def no_answer(server: Server, error: httpx.TransportError) -> str:
    """A reason for people: which server, and whether it was gone or too slow."""
    return f"{server.url}: {type(error).__name__} {error}".rstrip()


def parse_version(weight_version: str) -> int:
    """The policy version in vLLM's notation; "default" (never updated) is 0, no version (in the middle of an update) -1."""
    return {"default": 0, UPDATING: -1}[weight_version] if weight_version in ("default", UPDATING) else int(weight_version)


def error_message(response: httpx.Response) -> str:
    """What a server says about a failed request."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(response.json()["error"]["message"])
    return response.text[:2000]


def address(url: str) -> str:
    """The base address that an entry of rollout.urls stands for, empty while the file that it names is not there."""
    if url.startswith(("http://", "https://")):
        return url.rstrip("/")
    with contextlib.suppress(FileNotFoundError):
        return Path(url).read_text().strip().rstrip("/")
    return ""


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
