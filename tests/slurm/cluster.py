"""A real Slurm of four nodes on this machine: munged, slurmctld and four slurmd in a folder of the test's own."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
SEARCHED = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
NUM_NODES = 4
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
REPOSITORY = Path(__file__).resolve().parents[2]
SMOKE = ("experiment=smoke", "cluster.partition=debug", "cluster.nodes=2", f"cluster.python={sys.executable}")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ctld_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmUser={user}
SlurmdUser={user}
JobRequeue=1
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=3600
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm that are not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]


@dataclass
class Cluster:
    """`start` in an empty folder with a short path (munge's socket), `stop` at the end. Nodes are t1..t4 and share this host."""

    folder: Path
    daemons: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What commands and jobs need to find this cluster and no other."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return outer | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCHED}

    def start(self) -> None:
        """Raises RuntimeError with the daemons' logs when the nodes are not idle within 30 s."""
        ports = _free_ports(NUM_NODES + 1)
        values = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": self.folder, "nodes": f"t[1-{NUM_NODES}]"}
        text = CONFIG.format(**values, ctld_port=ports, first_port=ports + 1, last_port=ports + NUM_NODES)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        paths = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *paths)
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), 10)
        self._daemon("slurmctld", "-D", "-c")
        for node in range(1, NUM_NODES + 1):
            self._daemon("slurmd", "-D", "-c", "-N", f"t{node}")
        self.wait_for(lambda: self.command("sinfo", "-h", "-o", "%D %t", check=False).strip() == f"{NUM_NODES} idle", 30)

    def stop(self) -> None:
        """Cancel every job, then end the daemons that were started here, by their ids."""
        if len(self.daemons) > 1 and self.daemons[1].poll() is None:
            self.command("scancel", "--user", getpass.getuser(), check=False)
            deadline = time.monotonic() + 20
            while self.command("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def command(self, *words: str, check: bool = True, cwd: Path | None = None) -> str:
        """Standard output of a command on this cluster."""
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self) -> list[str]:
        """Ids of jobs in the queue."""
        return self.command("squeue", "-h", "-r", "-o", "%i").split()

    def show(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`; of an array, those of the element `job`."""
        words = self.command("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, timeout_s: float = 900) -> str:
        """The state in which a job ends."""
        self.wait_for(lambda: self.state(job) in OVER, timeout_s)
        return self.state(job)

    def processes(self, job: str) -> list[int]:
        """The daemons of a job's script and steps; none are left when one start of it is over."""
        return [p.pid for p in psutil.process_iter(["cmdline"]) if f"slurmstepd: [{job}." in " ".join(p.info["cmdline"] or ())]

    def log(self, job: str) -> str:
        """What a job has printed so far, over all of its starts."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else f"no log at {path}"

    def completed(self, *jobs: str) -> None:
        """Wait until jobs have ended, all of them well."""
        for job in jobs:
            state = self.wait(job)
            said = [line for line in (self.folder / "slurmctld.log").read_text().splitlines() if f"JobId={job.partition('_')[0]}" in line]
            assert state == "COMPLETED", "\n".join([f"{job} {self.show(job)}", *said, self.log(job)[-4000:]])

    def wait_for(self, happened: Callable[[], bool], timeout_s: float) -> None:
        """Raises RuntimeError with the daemons' logs when it does not happen in time."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            if time.monotonic() > deadline:
                logs = [f"--- {path.name}\n" + path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log"))]
                raise RuntimeError(f"Slurm: not within {timeout_s} s\n" + "\n".join(logs))
            time.sleep(0.2)

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=SEARCHED)
        with open(self.folder / f"{name}.{len(self.daemons)}.log", "wb") as log:
            self.daemons.append(subprocess.Popen([program, *arguments], env=self.environment, stdout=log, stderr=log))


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    first = 15000 + os.getpid() % 4000  # under those of rendezvous, 20000 + job id
    while True:
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(sockets):
                probe.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            first += count
        finally:
            for probe in sockets:
                probe.close()
