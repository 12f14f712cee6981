"""Several processes that train together: who they are, how they are connected, and how they agree."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from holdfast.strategies.agreement import of_job
from holdfast.strategies.base import Strategy
from holdfast.strategies.connection import connection
from holdfast.strategies.environments import ClusterEnvironment, find_environment
from holdfast.strategies.exchange import gathered, packed, reduced, unpacked
from holdfast.strategies.launch import launcher
from holdfast.utilities.nested import mapped
from holdfast.utilities.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from holdfast.accelerators.base import Accelerator
    from holdfast.checkpoint.checkpoint_io import CheckpointIO
    from holdfast.training.precision import Precision
    from holdfast.training.trainer import Trainer

T = TypeVar("T")

DEFAULT_TIMEOUT = timedelta(minutes=30)


class ParallelStrategy(Strategy):
    """What all strategies with several processes share: the processes, their groups, and agreement.

    Args:
        accelerator: The kind of device; None lets the trainer choose.
        parallel_devices: This machine's devices, one for each of its processes; None lets the trainer choose.
        cluster_environment: What the launcher says; None finds it out.
        checkpoint_io: What writes and reads checkpoints; None for holdfast's own engine.
        precision_plugin: The number format; None lets the trainer's ``precision=`` decide.
        process_group_backend: "gloo" or "nccl"; None takes nccl on GPUs and gloo elsewhere.
        timeout: After this time a process that waits for others in vain gives up.
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision_plugin)
        self.given_devices = list(parallel_devices) if parallel_devices else None
        """The devices that it was given itself."""
        self._devices = self.given_devices or [torch.device("cpu")]
        self.cluster_environment = cluster_environment
        self.num_nodes = 1
        self.process_group_backend = process_group_backend
        self.timeout = DEFAULT_TIMEOUT if timeout is None else timeout

    def configure(self, devices: list[torch.device], num_nodes: int) -> None:
        """Take note of this machine's devices and the number of machines; called by the trainer once."""
        self._devices, self.num_nodes = devices, num_nodes
        environment = self.environment
        environment.validate_settings(num_devices=len(devices), num_nodes=num_nodes)
        environment.set_world_size(len(devices) * num_nodes)
        environment.set_global_rank(environment.node_rank() * len(devices) + environment.local_rank())
        rank_zero_only.rank = environment.global_rank()  # type: ignore[attr-defined]

    @property
    def environment(self) -> ClusterEnvironment:
        """What the launcher says about this process."""
        if self.cluster_environment is None:
            self.cluster_environment = find_environment()
        return self.cluster_environment

    # -- who and where ---------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        return self._devices[self.local_rank % len(self._devices)]

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices of this machine's processes."""
        return self._devices

    @property
    def global_rank(self) -> int:
        """Rank of this process in the job."""
        return self.environment.global_rank()

    @property
    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return self.environment.local_rank()

    @property
    def node_rank(self) -> int:
        """Rank of this machine in the job."""
        return self.environment.node_rank()

    @property
    def world_size(self) -> int:
        """Processes in the job."""
        return self.environment.world_size()

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes and speaks for all."""
        return self.global_rank == 0

    # -- connecting ------------------------------------------------------------------------------------------

    @property
    def store(self) -> Any:
        """The job's store, once the processes are connected; a wait in it needs a ``clone()`` of its own."""
        return connection.store

    @property
    def coordination(self) -> Any:
        """A gloo group of all processes, on which they agree; training's own traffic is on another one."""
        return connection.coordination

    def setup_environment(self) -> None:
        """Start the other processes where nobody else does, and connect with them; once for all runs."""
        super().setup_environment()
        connection.join(
            self.environment,
            len(self._devices),
            backend=self._backend(),
            device=self.root_device,
            timeout=self.timeout,
        )
        self.alone = False
        if self.world_size > 1:
            timeout_s = self.timeout.total_seconds()
            self.agreement = of_job(self.store, self.global_rank, self.world_size, timeout_s)
            self.agreement.look = connection.look
            if launcher.children:
                self.agreement.leave_after_s = 0.0  # they wait for this process, until it ends

    def _backend(self) -> str:
        if self.process_group_backend is not None:
            return self.process_group_backend
        # With gloo beside it, tensors on the CPU can be exchanged too.
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"

    def setup(self, trainer: Trainer) -> None:
        """Bring the module onto the device; where rank 0 has trained it alone before, with its weights."""
        super().setup(trainer)
        if connection.was_alone:
            for tensor in (*trainer.lightning_module.parameters(), *trainer.lightning_module.buffers()):
                if not tensor.is_meta:
                    dist.broadcast(tensor.detach(), 0, group=self._group_for(tensor, None))

    def after_request(self, trainer: Trainer, serve: Callable[[Any], None]) -> None:
        """Called when a request to the trainer is over: a process that rank 0 has started goes no further."""
        connection.done(self, serve)

    def call_others(self, request: Any) -> AbstractContextManager[bool]:
        """Have the processes that wait behind a request of this trainer take part in what follows."""
        return connection.call_others(self, request)

    def explain(self, error: BaseException) -> BaseException:
        """What really ended a request: the error, or a failure elsewhere behind it; the others are told."""
        return connection.explain(error)

    @property
    def cut_off(self) -> bool:
        """Whether the job has failed, so that nothing can be exchanged any more."""
        return self.coordination is None and connection.failure is not None and self.world_size > 1

    # -- agreement -------------------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait until every process is here. Ranks: all. Blocks: until the last one arrives."""
        if self._connected():
            dist.barrier(group=self.coordination)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return rank ``src``'s object, with tensors on this process's device where they were on a GPU.

        Ranks: all. Blocks: until it has arrived.
        """
        if not self._connected():
            return obj
        held = [self._packed(obj) if self.global_rank == src else None]
        dist.broadcast_object_list(held, src=src, group=self.coordination)
        # The object itself where it comes from: others may hold parts of it.
        return obj if self.global_rank == src else unpacked(held[0], self.root_device)

    def gather(self, obj: T, dst: int = 0) -> list[T] | None:
        """Return every process's object, by rank, on rank ``dst``; None elsewhere. Ranks: all."""
        if not self._connected():
            return [obj]
        held: list[Any] | None = [None] * self.world_size if self.global_rank == dst else None
        dist.gather_object(self._packed(obj), held, dst=dst, group=self.coordination)
        return None if held is None else [unpacked(one, self.root_device) for one in held]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the value reduced over all processes: a new tensor, or a number for a number.

        Args:
            tensor: A tensor or a number; anything else comes back as it is.
            group: The processes; None for all.
            reduce_op: "mean", "sum", "min", "max", "product", or torch's.

        Ranks: all. Blocks: until all have given theirs.
        """
        if not isinstance(tensor, (torch.Tensor, bool, int, float)) or not self._connected():
            return tensor
        return reduced(tensor, self._group_for(tensor, group), reduce_op)

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return every process's tensor, stacked in the order of ranks; of values nested, each one's.

        Args:
            tensor: A tensor, a number or an array of NumPy, or dicts, lists and tuples of them, of the same
                shapes everywhere.
            group: The processes; None for all.
            sync_grads: Let gradients flow back to the process that a tensor came from.

        Ranks: all. Blocks: until all have given theirs.
        """
        if not self._connected():
            return tensor
        return mapped(tensor, lambda one: self._gathered(one, group, sync_grads))

    def _gathered(self, value: Any, group: Any, sync_grads: bool) -> Any:
        if isinstance(value, (bool, int, float)) or type(value).__module__ == "numpy":
            value = torch.as_tensor(value, device=self.root_device)
        if not isinstance(value, torch.Tensor):
            return value
        return gathered(value, self._group_for(value, group), sync_grads)

    def _group_for(self, value: Any, group: Any) -> Any:
        """The group; for a tensor on the CPU one that can exchange it."""
        if group is not None or (isinstance(value, torch.Tensor) and value.device.type != "cpu"):
            return group
        return self.coordination if self._backend() == "nccl" else None

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all (or any) processes said True. Ranks: all. Blocks: until all have said."""
        if not self._connected():
            return decision
        said = torch.tensor(int(decision))
        dist.all_reduce(said, op=dist.ReduceOp.MIN if all else dist.ReduceOp.MAX, group=self.coordination)
        return bool(said.item())

    def _packed(self, obj: Any) -> Any:
        return obj if self.root_device.type == "cpu" else packed(obj)

    def _connected(self) -> bool:
        """Whether there is somebody to exchange anything with.

        Raises:
            RankFailed: there was, and the job has failed since.
        """
        if self.alone or connection.between_requests:
            return False
        if self.coordination is not None:
            if self.agreement is not None:
                self.agreement.operations += 1
            return True
        failure = connection.failure
        if failure is not None and self.cut_off:
            raise failure.error()
        return False
