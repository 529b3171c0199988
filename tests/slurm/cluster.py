"""A Slurm of one node on this machine, for as long as a test takes: munged, slurmctld and slurmd, all in one folder.

Needs Debian's packages ``slurm-wlm`` and ``munge`` (``apt-get install slurm-wlm munge``), installs nothing, and uses no
service of the system: own key, own socket, own ports. Works as root and as a user. Try it by hand:

    python tests/slurm/cluster.py COMMAND...      runs COMMAND (a shell without one) where sbatch, squeue and srun work
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=60
SlurmdTimeout=600
MessageTimeout=60
NodeName={host} NodeAddr=127.0.0.1 CPUs={processors} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=120 State=UP
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    _with_sbin()
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def cluster(folder: Path, processors: int = 2) -> Iterator[None]:
    """Start the daemons with their files in ``folder``; their clients find them through SLURM_CONF while this lasts."""
    _with_sbin()
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    ports = _free_ports(2)
    values = {"host": socket.gethostname().split(".")[0], "folder": folder, "user": user, "processors": processors}
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    os.chmod(folder, 0o755)  # munged insists
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    os.chmod(folder / "munge.key", 0o400)
    configuration = CONFIGURATION.format(**values, controller_port=ports[0], node_port=ports[1])
    (folder / "slurm.conf").write_text(configuration)
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "output.log").open("wb") as output:

            def start(*command: str) -> None:
                daemons.append(subprocess.Popen(command, stdout=output, stderr=output))

            start("munged", "--foreground", "--force", *files, f"--socket={folder}/munge.socket")
            _wait((folder / "munge.socket").exists, "munged", folder)
            start("slurmctld", "-D", "-c")
            start("slurmd", "-D")
            _wait(lambda: "idle" in _said("sinfo", "-h", "-o", "%T"), "slurmctld and slurmd", folder)
        yield
    finally:
        subprocess.run(["scancel", f"--user={user}"], capture_output=True, timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def _with_sbin() -> None:
    """Daemons are in sbin, which is not on a user's path."""
    path = os.environ["PATH"].split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*path, *(each for each in ("/usr/sbin", "/sbin") if each not in path)])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def _wait(ready, what: str, folder: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"{what} did not start in {seconds:.0f} s:\n{logs}")
        time.sleep(0.5)


if __name__ == "__main__":
    if lacking := missing():
        sys.exit(f"not installed: {', '.join(lacking)}: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm") as name, cluster(Path(name) / "cluster"):
        sys.exit(subprocess.run(sys.argv[1:] or [os.environ.get("SHELL", "sh")]).returncode)
