"""A real SLURM of two nodes on this machine, for tests: installed when missing, as root, on Debian."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
ReturnToService=2
KillWait=30
JobRequeue=1
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not():
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "needs root, to start a SLURM cluster: sudo make test-slow"
    if not shutil.which("slurmctld") and not shutil.which("apt-get"):
        return f"needs SLURM: apt-get install {' '.join(PACKAGES)}, or what your system calls them"
    return None


def install():
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))):
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "-qq", *words], env=env, check=True, stdout=subprocess.DEVNULL)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def call(*words):
    """What a SLURM command prints. Errors: CalledProcessError."""
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def cluster(folder):
    """Runs nodes n1 and n2 with partitions low and high, which preempts low; sets SLURM_CONF meanwhile."""
    install()
    folder = Path(folder)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    port, port1, port2 = free_ports(3)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, port=port, port1=port1, port2=port2))
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge, quiet = None, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # they have log files
    subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "/run/munge"], check=True)
    if not Path("/run/munge/munge.socket.2").is_socket():
        munge = subprocess.Popen(["runuser", "-u", "munge", "--", shutil.which("munged"), "--foreground"], **quiet)
    daemons = []
    try:
        daemons += [subprocess.Popen(["slurmctld", "-D", "-c"], **quiet)]
        daemons += [subprocess.Popen(["slurmd", "-D", "-N", node], **quiet) for node in ("n1", "n2")]
        end = time.monotonic() + 60
        while (
            subprocess.run(["sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D"], capture_output=True).stdout
            != b"2\n"
        ):
            assert time.monotonic() < end, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(1)
        for process in [*reversed(daemons), *([munge] if munge else [])]:
            process.terminate()
            process.wait()
        del os.environ["SLURM_CONF"]
