"""torchrun that lets its processes save: `python -m pivotrl.launch --standalone --nproc-per-node 2 recipes/train_grpo.py ...`.

Takes torchrun's own arguments. Torchrun kills its workers 30 s after a SIGTERM, does not know SIGUSR1, and ends with 1 whatever they
ended with. Here both signals go on to the workers, which take the time they need, and the exit code is theirs, on every node.
"""

import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher import api

from pivotrl.preemption import SAVED, SIGNALS

OTHERS_S = 60.0  # ranks that saved leave together: other nodes' are over within seconds


class Agent(LocalElasticAgent):
    """Torchrun's agent of one node. Where the workers saved it waits for the other nodes' agents, as torchrun does after success only.

    One agent holds the rendezvous store. If it left first, the others would lose the store, and their workers' exit codes with it.
    """

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and exit_code(_codes(result)) == SAVED:
            self._remaining_restarts = 0  # whoever asked them to leave starts them again
            self._exit_barrier_timeout = OTHERS_S
            self._exit_barrier()
        return result


def main(arguments: Sequence[str]) -> int:
    """Start the workers, wait for them, and return their exit code: 0 if all ended well, else the worst one's.

    On Ctrl-C torchrun's own way applies: it passes SIGINT on and waits 30 s.
    """
    api.LocalElasticAgent = Agent  # what run.run makes its agent of
    options = run.parse_args(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *arguments])
    for number in SIGNALS:
        signal.signal(number, _pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the pipeline blocks SIGUSR1 in what it starts
    try:
        run.run(options)
    except ChildFailedError as error:
        code = exit_code(_codes(error))
        if code != SAVED:
            print(error, file=sys.stderr)
        return code
    except RendezvousConnectionError:
        print("launch: another node's launcher, which holds the rendezvous, has ended; its log says why (exit code 1)", file=sys.stderr)
        return 1
    return 0


def exit_code(codes: Mapping[int, int]) -> int:
    """One code for all failed ranks: SAVED if that is what all say, else the one of the lowest rank that failed otherwise.

    SIGTERM counts only where there is nothing else: torchrun ends the others by it. A process ended by a signal (negative here)
    gives 128 + signal, as in a shell.
    """
    ended = [code for _, code in sorted(codes.items())]
    own = [code for code in ended if code != -signal.SIGTERM] or ended
    failed = [code for code in own if code != SAVED]
    if not failed:
        return SAVED
    return failed[0] if failed[0] > 0 else 128 - failed[0]


def _codes(ended: RunResult | ChildFailedError) -> dict[int, int]:
    return {rank: failure.exitcode for rank, failure in ended.failures.items()}


def _pass_on(number: int, frame: FrameType | None) -> None:
    for worker in psutil.Process().children():  # torchrun's agent runs in this process: its children are the workers
        try:
            worker.send_signal(number)
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
