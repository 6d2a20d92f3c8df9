"""Asked to leave: SIGUSR1 and SIGTERM (Slurm before a time limit, or a preemption) end a stage saved, with exit code 85.

A signal only raises a flag. A stage looks at it where it can stop without losing work, writes what it has and raises `Preempted`.
Started again, it goes on there. docs/preemption.md says which process gets which signal.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVED = 85  # below 128, so no shell mistakes it for a signal, and used by nothing else here
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
LISTEN_S = 0.5

_received: list[int] = []  # not an Event: setting one in a handler can wait for a lock that the interrupted code holds


class Preempted(SystemExit):
    """Ends the process with code 85; the context managers on the way out close what is open. `progress` says what is saved."""

    def __init__(self, progress: str):
        super().__init__(SAVED)
        self.progress = progress

    def __str__(self) -> str:
        return self.progress


def requested() -> bool:
    """Whether this process was asked to leave."""
    return bool(_received)


def received() -> list[int]:
    """The signals that came, in order."""
    return list(_received)


def check(progress: str) -> None:
    """Raise `Preempted` if this process was asked to leave. For stages of one process; several ask `agreed`."""
    if requested():
        raise Preempted(progress)


def agreed() -> bool:
    """Whether any process was asked to leave: every rank calls it and gets the same answer. One integer is reduced."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return requested()
    flag = torch.tensor([int(requested())], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def leave_if_agreed(progress: str) -> None:
    """Raise `Preempted` on every rank if any was asked to leave; every rank calls it."""
    if agreed():
        raise Preempted(progress)


@contextmanager
def handled(stage: str) -> Iterator[None]:
    """Around a recipe's body, in the main thread: signals raise the flag; ranks that leave wait for each other before they end.

    SIGUSR1 is blocked in everything started within: rollout servers and verifiers do not die when Slurm sends it to all
    processes of a step.
    """
    _received.clear()
    handlers = {number: signal.signal(number, _note) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    ended = threading.Event()
    threading.Thread(target=_listen, args=(ended,), name="preemption", daemon=True).start()
    try:
        yield
    except Preempted as reason:
        _leave_together(f"{stage}: {reason.progress}; the same command goes on from there (exit code {SAVED})")
        # When the first rank ends, torchrun sends SIGTERM to the others, which are about to end with the same code.
        handlers = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        ended.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None = None) -> None:
    _received.append(number)


def _listen(ended: threading.Event) -> None:
    """Take SIGUSR1 on a thread of its own, since the threads that start other processes block it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    while not ended.is_set():
        found = signal.sigtimedwait({signal.SIGUSR1}, LISTEN_S)
        if found is not None:
            _note(found.si_signo)


def _leave_together(sentence: str) -> None:
    """Torchrun stops all when the first one ends, and the main process may still be stopping its servers."""
    dist = sys.modules.get("torch.distributed")  # a stage without it has one process
    several = dist is not None and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0:
        print(sentence, file=sys.stderr, flush=True)
    if several:
        dist.barrier()
        dist.destroy_process_group()
