"""Processes of the comparison: recipes and rollout servers that never outlive the program that started them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pivotrl.recipe import CONF_DIR
from pivotrl.rollout.server import guard
from pivotrl.rollout.serving import url_paths

ROOT = CONF_DIR.parent
STOP_GRACE_S = 60.0
POLL_S = 0.2


class Child:
    """A process in a session of its own, so that Ctrl-C reaches it through us alone. If we are killed, so is its group.

    `held` are file descriptors that it keeps open, such as a lock's.
    """

    def __init__(self, command: Sequence[str], log: Path, *, held: Sequence[int] = ()):
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, pass_fds=tuple(held)
            )
        self._watchdog = guard(self.process)

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def wait(self, seconds: float) -> int | None:
        """Wait so long at most; the exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.code

    def terminate(self) -> None:
        """Ask it to end."""
        if self.code is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self, grace_s: float = STOP_GRACE_S) -> None:
        """End it and all below it: asked first, killed after `grace_s` seconds. Nothing for one that has ended."""
        self.terminate()
        self.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._watchdog.kill()
        self._watchdog.wait()


class LaneServer:
    """The one rollout server of a lane, started when it is first needed; every run of the lane gives it its own weights.

    Recipes start when it answers, so that no stage's seconds hold its start.
    """

    def __init__(self, index: int, root: Path, overrides: Sequence[str]):
        self.index, self.root, self.overrides = index, root, tuple(overrides)
        self._child: Child | None = None
        self._starts = 0

    @property
    def name(self) -> str:
        """Another one for every start, so that nobody reads the address of a server that was killed."""
        return f"lane_{self.index}_{os.getpid()}_{self._starts}"

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"server_{self.index}.log"

    @property
    def url_path(self) -> Path:
        """The file that holds its address, as soon as it answers."""
        (path,) = url_paths(self.root / "servers" / self.name, num_nodes=1, num_servers=1)
        return path

    def start(self) -> None:
        """Start it where none runs, and return at once."""
        if self._child is None or self._child.code is not None:
            self.close()
            self._starts += 1
            command = [sys.executable, str(ROOT / "tools" / "serve_rollouts.py"), "--name", self.name, f"run_dir={self.root}"]
            self._child = Child([*command, *self.overrides], self.log)

    def ready(self) -> bool:
        """Whether it answers.

        Raises:
            RuntimeError: it has ended instead.
        """
        if self.url_path.exists():
            return True
        if self._child is None or self._child.code is not None:
            raise RuntimeError(f"the rollout server of lane {self.index} ended before it answered; see {self.log}")
        return False

    def override(self) -> str:
        """What attaches a recipe to it."""
        return f"rollout.urls=[{self.url_path}]"

    def close(self) -> None:
        """Stop it, if it runs."""
        if self._child is not None:
            self._child.close()
            self._child = None


class Lock:
    """At most one program works in a folder. The children hold it too, so that what a killed program left is waited for."""

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self._file: IO[str] | None = None

    @property
    def descriptor(self) -> int:
        assert self._file is not None
        return self._file.fileno()

    def take(self, seconds: float = 5.0) -> None:
        """Wait so long for it at most.

        Raises:
            ValueError: somebody else holds it.
        """
        import fcntl
        import time

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+")
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.release()
                    message = f"{self.path.parent} is in use by another comparison that still runs: stop it, or give another --folder"
                    raise ValueError(message) from None
                time.sleep(POLL_S)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
