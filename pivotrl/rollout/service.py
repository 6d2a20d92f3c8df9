"""Starts, watches and stops the vLLM servers of one run, and keeps them on the newest policy weights."""

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from pivotrl.config import RolloutConfig
from pivotrl.rollout import WeightFile

PORT_RETRIES = 3
STOP_GRACE_S = 10.0
HEALTH_TIMEOUT_S = 10.0
SHARED_MEMORY = Path("/dev/shm")
# they would make the engine join the trainer's process group
TORCHRUN_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"}
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


@dataclass
class Server:
    """One vLLM server; `process` and `watchdog` are None for a server that somebody else runs."""

    url: str
    log_path: Path | None = None
    process: subprocess.Popen | None = None
    watchdog: subprocess.Popen | None = None
    ready: bool = False
    restarts: int = 0
    port_retries: int = 0


class RolloutService:
    """The rollout engines of one run: `with RolloutService(...) as service: service.wait_ready()`.

    Entering starts config.num_servers servers without waiting, so that the trainer can be built meanwhile. With config.urls
    it attaches to running servers and starts or stops nothing. Logs go to log_dir/server_<i>.log.

    Raises:
        ValueError: the configuration cannot work with this model.
    """

    worker_extension = "pivotrl.rollout.receiver.WorkerExtension"

    def __init__(self, config: RolloutConfig, model_path: Path, log_dir: Path, *, seed: int):
        self.config, self.model_path, self.log_dir, self.seed = config, Path(model_path), Path(log_dir), seed
        self.max_model_tokens = 0 if config.urls else self._max_model_tokens()
        self._weights: WeightFile | None = None
        self._weights_dir: Path | None = None
        self._num_files = 0
        self._weights_lock: IO[str] | None = None
        self._servers = [Server(url=url.rstrip("/")) for url in config.urls]
        self._lock = threading.RLock()
        # no proxies: they have no way to our servers; no kept connections: vLLM resets them after an error
        self._http = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))

    @property
    def urls(self) -> list[str]:
        """Base addresses; a server that was restarted has a new one."""
        return [server.url for server in self._servers]

    @property
    def num_restarts(self) -> int:
        return sum(server.restarts for server in self._servers)

    def __enter__(self) -> "RolloutService":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Launch the servers and return at once; a second call does nothing."""
        with self._lock:
            if self._servers:
                return
            self.log_dir.mkdir(parents=True, exist_ok=True)
            atexit.register(self.close)
            self._servers = [Server(url="", log_path=self.log_dir / f"server_{i}.log") for i in range(self.config.num_servers)]
            for server in self._servers:
                self._launch(server)

    def wait_ready(self) -> None:
        """Block until every server answers, telling stderr about it every ten seconds.

        Raises:
            RuntimeError: a server process ended; shows the end of its log.
            TimeoutError: config.startup_timeout_s went by.
        """
        with self._lock:
            if all(server.ready for server in self._servers) and self._servers:
                return
            self.start()
            started = told = time.monotonic()
            while waiting := [server for server in self._servers if not self._is_ready(server)]:
                elapsed = time.monotonic() - started
                if elapsed > self.config.startup_timeout_s:
                    names = ", ".join(str(server.log_path or server.url) for server in waiting)
                    raise TimeoutError(f"no answer after {elapsed:.0f} s (rollout.startup_timeout_s) from {names}")
                if time.monotonic() - told >= 10:
                    told = time.monotonic()
                    print(f"rollout: {len(waiting)} of {len(self._servers)} servers still starting, {elapsed:.0f} s", file=sys.stderr)
                time.sleep(0.2)
            print(f"rollout: {len(self._servers)} servers ready, waited {time.monotonic() - started:.1f} s", file=sys.stderr)

    def ensure_alive(self) -> None:
        """Restart every server that died or no longer answers, and give it the newest weights before it serves.

        Raises:
            RuntimeError: a server needs more than config.max_restarts restarts; shows the end of its log.
            ConnectionError: an attached server does not answer.
        """
        with self._lock:
            self.wait_ready()
            dead = [server for server in self._servers if not self._answers(server)]
            for server in dead:
                if not server.log_path:
                    raise ConnectionError(f"rollout server {server.url} does not answer: it is not ours to restart")
                if server.restarts >= self.config.max_restarts:
                    raise RuntimeError(
                        f"a rollout server died {server.restarts + 1} times (rollout.max_restarts {self.config.max_restarts}); "
                        f"end of {server.log_path}:\n{_tail(server.log_path)}"
                    )
                print(f"rollout: restarting {server.url}, see {server.log_path}", file=sys.stderr)
                self._stop(server, grace_s=0.0)
                server.restarts += 1
                self._launch(server)
            if dead:
                self.wait_ready()

    def weights_path(self, version: int) -> Path:
        """Where to write the weights of a version: config.weights_dir, else shared memory, or the log folder for attached
        servers, which may run on other nodes."""
        if self._weights_dir is None:
            shared = self.config.weights_dir or (SHARED_MEMORY if SHARED_MEMORY.is_dir() and not self.config.urls else self.log_dir)
            Path(shared).mkdir(parents=True, exist_ok=True)
            self._weights_dir, self._weights_lock = _lock_new_folder(Path(shared))
            atexit.register(self.close)
        self._num_files += 1  # also a version that is pushed again gets a file of its own
        return self._weights_dir / f"version_{version}_{self._num_files}.safetensors"

    def load_weights(self, file: WeightFile) -> None:
        """Load `file` into every server and forget cached prefixes. The file then belongs to the service, which needs it for
        restarts and deletes it with the next one.

        Raises:
            RuntimeError: a server refused it; its message says why.
        """
        with self._lock:
            self.ensure_alive()
            try:
                with ThreadPoolExecutor(len(self._servers)) as pool:
                    list(pool.map(lambda server: self._send_weights(server, file), self._servers))
            except (RuntimeError, httpx.TransportError):
                file.path.unlink(missing_ok=True)
                raise
            previous, self._weights = self._weights, file
            if previous:
                previous.path.unlink(missing_ok=True)

    def reported_versions(self) -> list[int]:
        """The policy version that each server itself reports; 0 before the first weight sync."""
        return [parse_version(self._request("GET", f"{url}/weight_info")["weight_version"]) for url in self.urls]

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes on every server.

        Raises:
            RuntimeError: a server has requests in flight.
        """
        for server in self._servers:
            self._reset_prefix_cache(server)

    def close(self) -> None:
        """Stop the servers that this object started and delete its weight files; a second call does nothing."""
        with self._lock:
            atexit.unregister(self.close)
            for server in self._servers:
                if server.process:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(server.process.pid, signal.SIGTERM)
            for server in self._servers:
                self._stop(server, grace_s=STOP_GRACE_S)
            if self._weights_dir:
                shutil.rmtree(self._weights_dir, ignore_errors=True)
                self._weights_lock.close()
            self._servers, self._weights, self._weights_dir = [], None, None
            self._http.close()

    def command(self, server_index: int, port: int) -> list[str]:
        """The command line of one server."""
        config = self.config
        options: dict[str, object] = {
            "model": self.model_path,
            "served-model-name": "policy",
            "host": "127.0.0.1",
            "port": port,
            "dtype": config.dtype,
            "seed": (self.seed + server_index) % 2**31,
            "max-model-len": self.max_model_tokens,
            "max-num-seqs": config.max_sequences,
            "tensor-parallel-size": config.tensor_parallel,
            "logprobs-mode": "processed_logprobs",
            "generation-config": "vllm",  # sampling follows the request alone, not defaults in the model's folder
            "worker-extension-cls": self.worker_extension,
            "weight-transfer-config": json.dumps({"backend": "file"}),
        }
        # scale-out opens the token-in-token-out route, the one that reports every sampled token's weight version
        flags = ["--enable-scale-out", "--disable-uvicorn-access-log", *(["--enforce-eager"] if config.enforce_eager else [])]
        if config.tensor_parallel == 1:
            options["distributed-executor-backend"] = "uni"
        if _on_cuda():
            options["gpu-memory-utilization"] = config.gpu_memory_utilization
        else:
            options["kv-cache-memory-bytes"] = int(config.kv_cache_gib * 2**30)
            # whole prompts only: vLLM 0.32 dies on CPU when a seeded request's prompt is split over two steps
            options["max-num-batched-tokens"] = max(self.max_model_tokens, 8192)
            flags.append("--no-enable-chunked-prefill")
        values = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        return [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", *values, *flags]

    def environment(self, server_index: int) -> dict[str, str]:
        """The environment of one server."""
        paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        settings["VLLM_SERVER_DEV_MODE"] = "1"  # opens the weight-transfer and prefix-cache routes, on 127.0.0.1 only
        if _on_cuda():
            size, visible = self.config.tensor_parallel, os.environ.get("CUDA_VISIBLE_DEVICES", "")
            devices = self.config.gpus or (visible.split(",") if visible else range(self.config.num_servers * size))
            mine = list(devices)[server_index * size : (server_index + 1) * size]
            settings["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        else:
            # Spinning OpenMP threads beside a busy trainer cost a factor of ten; compilation costs 20 s at the first request.
            settings |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        return {name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES} | settings

    def _max_model_tokens(self) -> int:
        config, wanted = self.config, self.config.max_prompt_tokens + self.config.max_new_tokens
        if config.num_servers < 1:
            raise ValueError(f"rollout.num_servers is {config.num_servers}; give at least 1, or rollout.urls to attach to servers")
        if config.gpus and len(config.gpus) != config.num_servers * config.tensor_parallel:
            needed = config.num_servers * config.tensor_parallel
            raise ValueError(f"rollout.gpus names {len(config.gpus)} devices; num_servers * tensor_parallel needs {needed}")
        if not (self.model_path / "config.json").is_file():
            raise ValueError(f"{self.model_path} is no Hugging Face model folder: it has no config.json")
        positions = json.loads((self.model_path / "config.json").read_text())["max_position_embeddings"]
        if wanted > positions:
            raise ValueError(
                f"rollout.max_prompt_tokens + rollout.max_new_tokens = {wanted}, but the model has {positions} positions: lower one"
            )
        return min(wanted + 1, positions)  # one more, so that a full row can be scored

    def _launch(self, server: Server) -> None:
        index, port = self._servers.index(server), _free_port()
        server.url, server.ready = f"http://127.0.0.1:{port}", False
        with open(server.log_path, "ab") as log:
            log.write(f"\n--- starting on port {port}\n".encode())
            log.flush()
            server.process = subprocess.Popen(
                self.command(index, port),
                env=self.environment(index),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        arguments = [sys.executable, "-I", "-S", "-c", WATCHDOG, str(os.getpid()), str(server.process.pid)]
        server.watchdog = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True)

    def _is_ready(self, server: Server) -> bool:
        if server.ready:
            return True
        if server.process and server.process.poll() is not None:
            log = _tail(server.log_path)
            if "address already in use" not in log.lower() or server.port_retries >= PORT_RETRIES:
                raise RuntimeError(f"a rollout server ended with code {server.process.returncode}; end of {server.log_path}:\n{log}")
            server.port_retries += 1
            self._stop(server, grace_s=0.0)
            self._launch(server)
            return False
        if not self._health(server.url):
            return False
        if self._weights:
            self._send_weights(server, self._weights)
        server.ready = True
        return True

    def _answers(self, server: Server) -> bool:
        if server.process and server.process.poll() is not None:
            return False
        return any(self._health(server.url) for _ in range(3))

    def _send_weights(self, server: Server, file: WeightFile) -> None:
        timeout_s = self.config.request_timeout_s
        update = {"path": str(file.path.resolve()), "checksums": file.checksums}
        self._request("POST", f"{server.url}/start_weight_update", timeout_s=timeout_s)
        self._request("POST", f"{server.url}/update_weights", {"update_info": update}, timeout_s=timeout_s)
        self._request("POST", f"{server.url}/finish_weight_update", {"weight_version": str(file.version)}, timeout_s=timeout_s)
        self._reset_prefix_cache(server)

    def _request(self, method: str, url: str, payload: dict | None = None, *, timeout_s: float = 60.0) -> dict:
        response = self._http.request(method, url, json=payload, timeout=timeout_s)
        if response.is_error:
            raise RuntimeError(f"{method} {url} failed with status {response.status_code}: {error_message(response)}")
        return response.json()

    def _reset_prefix_cache(self, server: Server) -> None:
        if not self._request("POST", f"{server.url}/reset_prefix_cache")["success"]:
            raise RuntimeError(f"{server.url} has requests in flight: sync weights and reset the prefix cache only between batches")

    def _health(self, url: str) -> bool:
        try:
            return self._http.get(f"{url}/health", timeout=HEALTH_TIMEOUT_S).status_code == 200
        except httpx.TransportError:
            return False

    def _stop(self, server: Server, *, grace_s: float) -> None:
        if server.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(grace_s)
            # also the engine processes below it, which can outlive it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
        if server.watchdog:
            server.watchdog.kill()
            server.watchdog.wait()
        server.process = server.watchdog = None


def parse_version(weight_version: str) -> int:
    """The policy version in vLLM's notation; "default" (never updated) is 0."""
    return 0 if weight_version == "default" else int(weight_version)


def error_message(response: httpx.Response) -> str:
    """What a server says about a failed request."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(response.json()["error"]["message"])
    return response.text[:2000]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(path: Path, num_lines: int = 30) -> str:
    """The end of a server's log since its last start, headed by the engine's own error, which other messages bury."""
    lines = path.read_text(errors="replace").rpartition("--- starting on port")[2].splitlines()
    causes = [line for line in lines[:-num_lines] if "(EngineCore" in line and "Error: " in line]
    return "\n".join(causes[-1:] + lines[-num_lines:])


def _on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _lock_new_folder(parent: Path) -> tuple[Path, IO[str]]:
    """A new folder that nobody else sweeps away while we live; sweeps the folders of owners that died without cleaning up."""
    for lock_path in parent.glob("pivotrl-weights-*/lock"):
        with contextlib.suppress(OSError), open(lock_path) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_path.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="pivotrl-weights-", dir=parent))
    lock = open(folder / "lock.new", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / "lock.new", folder / "lock")  # it gets its name only once it is held
    return folder, lock
