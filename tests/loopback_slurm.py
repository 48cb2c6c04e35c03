"""A real Slurm on this machine: controller, two nodes and munge, as root, without systemd or GPUs. For tests."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "squeue")
CONF = """ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=cred_expire=10,socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
JobRequeue=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node1} CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node2} CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no Slurm can run here; empty when it can."""
    if os.geteuid() != 0:
        return "a loopback Slurm needs root"
    lacking = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    return f"not installed: {', '.join(lacking)} (Debian: slurm-wlm, munge)" if lacking else ""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Cluster:
    """Two nodes, n1 and n2, of 4 CPUs each. ``environment`` is what the commands of Slurm need."""

    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen]

    def start(self, name: str, *command: str) -> None:
        """Start a daemon."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.daemons[name] = subprocess.Popen(command, env=self.environment, **quiet)

    def start_node(self, name: str) -> None:
        """Start a node, or start it again."""
        self.start(name, "slurmd", "-D", "-N", name)

    def lose_node(self, name: str, job: str) -> list[psutil.Process]:
        """A node as without power: no daemon is left, and its tasks say nothing more, not even that they are gone."""
        tasks = self.tasks(job, name)
        for task in tasks:
            task.suspend()
        self.daemons[name].kill()
        self.daemons[name].wait()
        for step in {task.parent() for task in tasks} - {*tasks, None}:
            step.kill()
        return tasks

    def tasks(self, job: str, node: str) -> list[psutil.Process]:
        """The Python processes of a job on a node."""
        found = []
        for process in psutil.process_iter(["name"]):
            try:
                given = process.environ() if process.info["name"].startswith(("python", "mp-", "torchrun")) else {}
            except psutil.Error:
                continue
            if (given.get("SLURM_JOB_ID"), given.get("SLURMD_NODENAME")) == (job, node):
                found.append(process)
        return found

    def output(self, *command: str, **how: Any) -> str:
        """What a command of Slurm prints."""
        return subprocess.check_output(command, env=self.environment, text=True, **how).strip()

    def wait_for_end(self, timeout_s: float) -> None:
        """Return when no job is left in the queue."""
        wait_for(lambda: not self.output("squeue", "--noheader"), "an empty queue", timeout_s)


@contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """A cluster with its own munge, ports and numbers of jobs, so that several run side by side."""
    for name in ("state", "spool-n1", "spool-n2", "munge"):
        (folder / name).mkdir(parents=True)
    port, node1, node2, first_job = free_ports(4)
    (folder / "slurm.conf").write_text(
        CONF.format(folder=folder, port=port, node1=node1, node2=node2, first_job=first_job)
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    cluster = Cluster(os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}, {})
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    words = [f"--{flag}={folder / 'munge' / name}" for flag, name in places.items()]
    cluster.start("munged", "munged", "--foreground", "--force", *words)
    try:
        wait_for((folder / "munge" / "socket").exists, "munge answers", timeout_s=30)
        cluster.start("slurmctld", "slurmctld", "-D", "-c")
        cluster.start_node("n1")
        cluster.start_node("n2")
        wait_for(lambda: states(cluster.environment) == {"idle"}, "nodes are idle", timeout_s=60)
        yield cluster
        cluster.output("scancel", "--full", "--user=root")  # what a failed test left
        cluster.wait_for_end(60)
    finally:
        for process in reversed(cluster.daemons.values()):
            process.terminate()
            process.wait(timeout=30)


def states(environment: dict[str, str]) -> set[str]:
    """The states of the nodes."""
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=environment, capture_output=True, text=True)
    return set(done.stdout.split())


def wait_for(condition, what: str, timeout_s: float) -> None:
    """Return when ``condition()`` is true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)
