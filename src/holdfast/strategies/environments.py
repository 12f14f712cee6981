"""Who started this process, and which of how many it is: asked of the launcher's environment variables."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from abc import ABC, abstractmethod

from holdfast.errors import ConfigError


class ClusterEnvironment(ABC):
    """What a launcher says about the processes of a job. Subclass it for a launcher of your own."""

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Whether this process was started by this launcher."""

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether the launcher starts all processes; otherwise the first one starts the others."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """Name or address of the machine where rank 0 runs."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """Port on which rank 0 answers."""

    @abstractmethod
    def world_size(self) -> int:
        """Processes in the job."""

    @abstractmethod
    def set_world_size(self, size: int) -> None:
        """Take note of the number of processes, where the launcher does not know it."""

    @abstractmethod
    def global_rank(self) -> int:
        """Rank of this process in the job."""

    @abstractmethod
    def set_global_rank(self, rank: int) -> None:
        """Take note of this process's rank, where the launcher does not know it."""

    @abstractmethod
    def local_rank(self) -> int:
        """Rank of this process on its machine."""

    @abstractmethod
    def node_rank(self) -> int:
        """Rank of this machine in the job."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the trainer's devices and machines with what the launcher started.

        Raises:
            ConfigError: they differ.
        """

    def teardown(self) -> None:
        """Forget the job; called when a run is over."""


class LightningEnvironment(ClusterEnvironment):
    """No launcher: the script was started by hand, and starts further processes itself."""

    def __init__(self) -> None:
        self._main_port: int | None = None
        self._global_rank = 0
        self._world_size = 1

    @staticmethod
    def detect() -> bool:
        """Always."""
        return True

    @property
    def creates_processes_externally(self) -> bool:
        """Whether somebody set LOCAL_RANK for this process."""
        return "LOCAL_RANK" in os.environ

    @property
    def main_address(self) -> str:
        """MASTER_ADDR, or this machine."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """MASTER_PORT, or a free port, the same one every time."""
        if self._main_port is None:
            given = os.environ.get("MASTER_PORT")
            self._main_port = _free_port() if given is None else int(given)
        return self._main_port

    def world_size(self) -> int:
        """What `set_world_size` said."""
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Take note of the number of processes."""
        self._world_size = size

    def global_rank(self) -> int:
        """What `set_global_rank` said."""
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        """Take note of this process's rank."""
        self._global_rank = rank

    def local_rank(self) -> int:
        """LOCAL_RANK, or 0."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        """NODE_RANK or GROUP_RANK, or 0."""
        return int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """See to it that the machines of a job find each other.

        Raises:
            ConfigError: there are several, and nothing says where rank 0 is.
        """
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if num_nodes > 1 and missing:
            raise ConfigError(
                f"Trainer(num_nodes={num_nodes}): {' and '.join(missing)} are to say where rank 0 is, and "
                "NODE_RANK which machine this is. Set them on each machine, or start the job with torchrun "
                "or srun."
            )

    def teardown(self) -> None:
        """Forget the world size that was left to the processes of this job."""
        os.environ.pop("WORLD_SIZE", None)


class TorchElasticEnvironment(ClusterEnvironment):
    """Started by torchrun."""

    @staticmethod
    def detect() -> bool:
        """Whether torchrun started this process."""
        return {"RANK", "GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= set(os.environ)

    @property
    def creates_processes_externally(self) -> bool:
        """Always."""
        return True

    @property
    def main_address(self) -> str:
        """MASTER_ADDR, or this machine."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """MASTER_PORT, or 12910."""
        return int(os.environ.get("MASTER_PORT", "12910"))

    def world_size(self) -> int:
        """WORLD_SIZE."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def local_world_size(self) -> int:
        """LOCAL_WORLD_SIZE."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def set_world_size(self, size: int) -> None:
        """Nothing: torchrun has set it."""

    def global_rank(self) -> int:
        """RANK."""
        return int(os.environ["RANK"])

    def set_global_rank(self, rank: int) -> None:
        """Nothing: torchrun has set it."""

    def local_rank(self) -> int:
        """LOCAL_RANK."""
        return int(os.environ["LOCAL_RANK"])

    def node_rank(self) -> int:
        """GROUP_RANK, or 0."""
        return int(os.environ.get("GROUP_RANK", "0"))

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the trainer's devices and machines with the processes that torchrun started.

        Raises:
            ConfigError: they differ.
        """
        _check_total("torchrun started", "processes", self.world_size(), num_devices, num_nodes)


class SLURMEnvironment(ClusterEnvironment):
    """Started by SLURM's srun.

    Args:
        auto_requeue: Whether a job that is about to be ended asks SLURM to start it again.
        requeue_signal: The signal by which SLURM says so; None for SIGUSR1.
    """

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        self.auto_requeue = auto_requeue
        self.requeue_signal = signal.SIGUSR1 if requeue_signal is None else requeue_signal

    @staticmethod
    def detect() -> bool:
        """Whether srun started this process, not as an interactive shell."""
        return "SLURM_NTASKS" in os.environ and SLURMEnvironment.job_name() not in ("bash", "interactive")

    @property
    def creates_processes_externally(self) -> bool:
        """Always."""
        return True

    @staticmethod
    def job_name() -> str | None:
        """The job's name, or None outside of a job."""
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> int | None:
        """The job's number, or None outside of a job and in an interactive one."""
        if SLURMEnvironment.job_name() in ("bash", "interactive"):
            return None
        found = os.environ.get("SLURM_JOB_ID", "")
        return int(found) if found.isdigit() else None

    @staticmethod
    def job_to_requeue() -> str | None:
        """What SLURM calls the job that this process is in, a task of an array too; None outside of one."""
        if SLURMEnvironment.job_id() is None:
            return None
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"{array}_{task}" if array and task else str(SLURMEnvironment.job_id())

    def is_being_ended(self) -> bool:
        """Whether SLURM says that the job is over already: somebody has cancelled it, or its time was up.

        Blocks: until SLURM has answered, or for ten seconds; no answer means no.
        """
        job = self.job_to_requeue()
        if job is None:
            return False
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        try:
            answer = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10,
                start_new_session=True,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return False
        return answer.stdout.strip() in ("CANCELLED", "COMPLETING", "TIMEOUT")

    def requeue(self) -> str | None:
        """Ask SLURM to start the job again; return why it does not, or None.

        SLURM then ends this job: what has to be durable is so by now.

        Blocks: until SLURM has answered, or for a minute.
        """
        job = self.job_to_requeue()
        if job is None:
            return "there is no job to requeue: SLURM_JOB_ID is not set, or the job is interactive"
        command = ["scontrol", "requeue", job]
        try:
            # In a session of its own: who ends this process and its like leaves it alone.
            answer = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                start_new_session=True,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"`{' '.join(command)}` failed: {error}"
        if answer.returncode == 0:
            return None
        said = (answer.stderr or answer.stdout).strip()
        return f"`{' '.join(command)}` failed with code {answer.returncode}: {said}"

    @property
    def main_address(self) -> str:
        """MASTER_ADDR, or the first machine of the job."""
        given = os.environ.get("MASTER_ADDR")
        return given or self.resolve_root_node_address(os.environ.get("SLURM_NODELIST", "127.0.0.1"))

    @property
    def main_port(self) -> int:
        """MASTER_PORT, or one that follows from the job's number."""
        given = os.environ.get("MASTER_PORT")
        if given is not None:
            return int(given)
        return 15000 + int((os.environ.get("SLURM_JOB_ID") or "0")[-4:])

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """The first machine of a list as SLURM writes it: "node[5-8,10],other" gives "node5"."""
        nodes = re.sub(r"\[(.*?)[,-].*\]", r"\1", nodes)
        nodes = re.sub(r"\[(.*?)\]", r"\1", nodes)
        return nodes.split(" ")[0].split(",")[0]

    def world_size(self) -> int:
        """SLURM_NTASKS."""
        return int(os.environ["SLURM_NTASKS"])

    def set_world_size(self, size: int) -> None:
        """Nothing: SLURM has set it."""

    def global_rank(self) -> int:
        """SLURM_PROCID."""
        return int(os.environ["SLURM_PROCID"])

    def set_global_rank(self, rank: int) -> None:
        """Nothing: SLURM has set it."""

    def local_rank(self) -> int:
        """SLURM_LOCALID."""
        return int(os.environ["SLURM_LOCALID"])

    def node_rank(self) -> int:
        """SLURM_NODEID."""
        return int(os.environ["SLURM_NODEID"])

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare the trainer's devices and machines with the job's.

        Raises:
            ConfigError: they differ.
        """
        for name, ours, variable in (
            ("devices", num_devices, "SLURM_NTASKS_PER_NODE"),
            ("num_nodes", num_nodes, "SLURM_NNODES"),
        ):
            theirs = os.environ.get(variable)
            if theirs is not None and theirs.isdigit() and int(theirs) != ours:
                raise ConfigError(
                    f"Trainer({name}={ours}) differs from SLURM's {variable}={theirs}. Make them equal."
                )
        _check_total("SLURM started", "tasks", self.world_size(), num_devices, num_nodes)


def find_environment() -> ClusterEnvironment:
    """What has started this process."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment() if SLURMEnvironment.detect() else LightningEnvironment()


def _check_total(who: str, what: str, started: int, num_devices: int, num_nodes: int) -> None:
    if num_devices * num_nodes == started:
        return
    alone = ", or use strategy='single_device' for a run of this process alone"
    raise ConfigError(
        f"{who} {started} {what}, but Trainer(devices={num_devices}, num_nodes={num_nodes}) means "
        f"{num_devices * num_nodes}. Make them equal{alone if num_devices * num_nodes == 1 else ''}."
    )


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])
