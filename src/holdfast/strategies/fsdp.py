"""Fully sharded training: every process has a part of each weight, gradient and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holdfast.errors import ConfigError
from holdfast.strategies.connection import connection
from holdfast.strategies.environments import ClusterEnvironment
from holdfast.strategies.fsdp_arguments import check_mixed_precision, check_names, check_torch, resharding
from holdfast.strategies.parallel import DEFAULT_TIMEOUT, ParallelStrategy
from holdfast.strategies.parts import HostCopies
from holdfast.strategies.sharded_gradients import (
    ShardedGradScaler,
    can_see_waiting,
    clip_by_norm,
    clip_by_value,
    put_back,
    waiting,
)
from holdfast.strategies.sharding import (
    ROOT,
    Policy,
    Root,
    check_policy,
    equalize,
    give_values,
    is_sharded,
    parts_to_shard,
    shard,
    to_device,
)
from holdfast.utilities.wrapped_names import plain_names

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from holdfast.accelerators.base import Accelerator
    from holdfast.checkpoint.checkpoint_io import CheckpointIO
    from holdfast.training.module import LightningModule
    from holdfast.training.precision import Precision
    from holdfast.training.trainer import Trainer


class FSDPStrategy(ParallelStrategy):
    """Fully sharded training by torch's `fully_shard` (FSDP2). A checkpoint is a directory by default.

    Each rank keeps its part of every parameter, as a DTensor; a part of the model is whole only while it
    computes. A module that calls `fully_shard` itself, in ``configure_model``, is left as it is.

    The parts of the model are gathered when their ``forward`` runs. Code that reads a part's weights, or runs
    another method of it, needs that part to belong to the root: leave it out of ``auto_wrap_policy``.

    Args:
        accelerator: The kind of device; None lets the trainer choose.
        parallel_devices: This machine's devices, one for each of its processes; None lets the trainer choose.
        cluster_environment: What the launcher says; None finds it out.
        checkpoint_io: What writes and reads checkpoints; None for holdfast's own.
        precision_plugin: The number format; None lets the trainer's ``precision=`` decide.
        process_group_backend: "gloo" or "nccl"; None takes nccl on GPUs and gloo elsewhere.
        timeout: After this time a process that waits for others in vain gives up.
        cpu_offload: Keep the parts in the host's memory, and step the optimizer there; or an OffloadPolicy.
        mixed_precision: A `MixedPrecisionPolicy` of torch.distributed.fsdp; None lets ``precision=`` decide.
        auto_wrap_policy: What is gathered and freed by itself: a set of module classes, or a function that
            says so of a module. None takes each direct child that has parameters.
        sharding_strategy: "FULL_SHARD" frees a part after its forward; "SHARD_GRAD_OP" keeps it until
            backward; with "HYBRID_SHARD" each machine has all parts.
        reshard_after_forward: As `fully_shard` takes it; None lets ``sharding_strategy`` decide.
        state_dict_type: "sharded" writes a directory, each rank its part; "full" one file, by rank 0.
        device_mesh: The ranks, as a DeviceMesh or as (replicas, parts); None is all ranks in one row.
        ignored_parameters: Parameters that are neither sharded nor averaged: each rank trains its own.
        kwargs: Lightning's ``ignored_states`` and ``ignored_modules``.

    Raises:
        ConfigError: an argument that `fully_shard` has no use for, or a torch older than 2.6.
    """

    strategy_name = "fsdp"
    shards_model = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        cpu_offload: Any = None,
        mixed_precision: Any = None,
        auto_wrap_policy: Policy | None = None,
        sharding_strategy: str = "FULL_SHARD",
        state_dict_type: str = "sharded",
        device_mesh: Any = None,
        reshard_after_forward: bool | int | None = None,
        ignored_parameters: Collection[nn.Parameter] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin,
            process_group_backend, timeout,
        )  # fmt: skip
        check_torch()
        self._ignored = set(ignored_parameters or ())
        for name in ("ignored_states", "ignored_modules"):
            for one in kwargs.pop(name, None) or ():
                self._ignored.update(one.parameters() if isinstance(one, nn.Module) else [one])
        check_names(kwargs)
        check_policy(auto_wrap_policy)
        if state_dict_type not in ("sharded", "full"):
            raise ConfigError(
                f"FSDPStrategy(state_dict_type={state_dict_type!r}): expected 'sharded' or 'full'."
            )
        check_mixed_precision(mixed_precision)
        self.auto_wrap_policy = auto_wrap_policy
        self.mixed_precision = mixed_precision
        self.state_dict_type = state_dict_type
        self.sharded = state_dict_type == "sharded"
        self.cpu_offload = cpu_offload
        self.reshard_after_forward, self._hybrid = resharding(sharding_strategy, reshard_after_forward)
        self._given_mesh = device_mesh
        self._mesh: Any = None
        self._root: Root | None = None
        self._may_wait = True
        self.host_copies = HostCopies()

    @property
    def device_mesh(self) -> Any:
        """The ranks, as a DeviceMesh; once they are connected."""
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        given = self._given_mesh
        if isinstance(given, DeviceMesh):
            return given
        if self._mesh is None or self._mesh[0] is not self.coordination:  # of another connection
            if given is None:
                per_node = len(self._devices)
                hybrid = self._hybrid and self.world_size > per_node
                given = (self.world_size // per_node, per_node) if hybrid else (self.world_size,)
            names = ("replicate", "shard") if len(given) == 2 else ("shard",)
            mesh = init_device_mesh(self.root_device.type, tuple(given), mesh_dim_names=names)
            self._mesh = self.coordination, mesh
        return self._mesh[1]

    # -- a run -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, which has the run's number format by then; for each module once. Ranks: all.

        Raises:
            ConfigError: BatchNorm layers are to be synchronized, which is not done here.
        """
        if self._accelerator is not None:
            self._accelerator.setup(trainer)
        module, precision = trainer.lightning_module, self._precision_plugin
        assert precision is not None
        layers = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        if trainer.sync_batchnorm and not all(isinstance(part, nn.SyncBatchNorm) for part in layers):
            raise ConfigError(
                f"Trainer(sync_batchnorm=True): strategy='fsdp' does not replace BatchNorm layers, and "
                f"{type(module).__name__} has some. Use strategy='ddp', or leave sync_batchnorm out: each "
                "process then uses the statistics of its own part of a batch."
            )
        known: Any = module.__dict__.get(ROOT)
        if known is None and not is_sharded(module):
            precision.convert_module(module)
            equalize(module, self.coordination)
            known = self._shard(module)
        self._root = known
        self._may_wait = can_see_waiting(module if known is None else known)
        to_device(module, self.root_device)
        self._fit_precision(precision)
        for name in ("backward", "optimizer_step"):
            self.__dict__.pop(name, None)
        if trainer.state.fn == "fit" and not module.automatic_optimization and known is not None:
            # The loops look these up when a fit starts.
            self.__dict__["backward"] = self._manual_backward
            self.__dict__["optimizer_step"] = self._manual_optimizer_step

    def _shard(self, module: LightningModule) -> Root:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

        own = set(module.parameters())
        if any(one.is_meta for one in self._ignored & own):
            raise ConfigError(
                "FSDPStrategy(ignored_parameters=...): one of them has no values, on the device meta."
            )
        name = getattr(self._precision_plugin, "precision", "32-true")
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(name)
        # Sums of gradients stay in full precision. The root's own weights do too, as under autocast alone.
        policy = self.mixed_precision or MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=None if half is None else torch.float32
        )
        root_dtype = None if self.mixed_precision is None else policy.param_dtype
        # Batches keep their dtype, and with it the targets: the parts convert what they are given.
        root_policy = MixedPrecisionPolicy(
            param_dtype=root_dtype, reduce_dtype=policy.reduce_dtype, cast_forward_inputs=False
        )
        offload = self.cpu_offload
        if not isinstance(offload, OffloadPolicy):
            pin = self.root_device.type == "cuda"
            offload = CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy()
        root = shard(
            module,
            parts_to_shard(module, self.auto_wrap_policy),
            mesh=self.device_mesh,
            policy=policy,
            root_policy=root_policy,
            reshard_after_forward=self.reshard_after_forward,
            offload=offload,
            ignored=self._ignored & own,
        )
        if any(one.is_meta for one in (*module.parameters(), *module.buffers())):
            give_values(module, torch.device("cpu") if self.cpu_offload else self.root_device)
        return root

    def _fit_precision(self, precision: Precision) -> None:
        """Have the number format know that each rank holds a part of every gradient."""
        if type(precision.scaler) is torch.amp.GradScaler:
            precision.scaler = ShardedGradScaler(self.root_device.type, like=precision.scaler)
        precision.clip_norm, precision.clip_value = clip_by_norm, clip_by_value

    def teardown(self) -> None:
        """Finish what is under way, and let the number format be used with any strategy again."""
        self.host_copies.clear()
        for name in ("clip_norm", "clip_value"):
            if self._precision_plugin is not None:
                self._precision_plugin.__dict__.pop(name, None)
        super().teardown()

    # -- a step ----------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, during which what the root holds is whole."""
        return self._through_root("training_step", args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, during which what the root holds is whole."""
        return self._and_reshard("validation_step", args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, during which what the root holds is whole."""
        return self._and_reshard("test_step", args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, during which what the root holds is whole."""
        return self._and_reshard("predict_step", args, kwargs)

    def _through_root(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._lightning_module is not None and self._precision_plugin is not None
        step = getattr(self._lightning_module, name)
        run = step if self._root is None else partial(self._root, step)
        with self._precision_plugin.forward_context():
            try:
                return run(*args, **kwargs)
            except RuntimeError as error:
                if "mixed torch.Tensor and DTensor" in str(error):
                    self._explain(name, error)
                raise

    def _and_reshard(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = self._through_root(name, args, kwargs)
        if self._root is not None:
            self._root.reshard()  # type: ignore[operator]
        return result

    def _explain(self, name: str, error: RuntimeError) -> None:
        raise ConfigError(
            f"{type(self._lightning_module).__name__}.{name} used weights of a part of the model other than "
            "by calling the part, which is what gathers them. Call the part itself, or leave it out of "
            "FSDPStrategy(auto_wrap_policy=...), so that it is whole during the step."
        ) from error

    def _manual_backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Backward in the middle of a step: what the root holds is reduced, and whole again afterwards."""
        root = self._root
        assert root is not None
        # The loss goes out of the root's forward, which is where the root waits for backward to begin.
        closure_loss = root(lambda: closure_loss)
        super().backward(closure_loss, optimizer, *args, **kwargs)
        root.unshard()  # type: ignore[operator]
        return closure_loss

    def _manual_optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any] | None,
        model: LightningModule | None = None,
        **kwargs: Any,
    ) -> Any:
        """A step in the middle of a step: the rest of it sees the weights that come out."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        root = self._root
        assert root is not None
        root.reshard()  # type: ignore[operator]
        root.unshard()  # type: ignore[operator]
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """A context in which backward adds up gradients in each process, without averaging them."""
        # Where nobody could save what waits, nothing may wait.
        roots = list(self._roots()) if self._may_wait else []
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)

    def _roots(self) -> Iterable[Any]:
        if self._root is not None:
            return [self._root]
        from torch.distributed.fsdp import FSDPModule

        assert self._lightning_module is not None
        return [part for part in self._lightning_module.modules() if isinstance(part, FSDPModule)]

    # -- checkpoints -----------------------------------------------------------------------------------------

    def keeps_buffers_equal(self, *, inside_window: bool) -> bool:
        """Never: each rank's own are what it goes on from."""
        return False

    @property
    def saving_group(self) -> Any:
        """A gloo group for the threads that save, in nobody's way. Ranks: all. Blocks: the first time."""
        return connection.saving_group(self.timeout)

    def waiting_gradients(self) -> dict[str, Tensor]:
        """The gradients that this rank has added up and not shared yet, whole, by parameter."""
        module = self._lightning_module
        assert module is not None
        found, plain = waiting(module if self._root is None else self._root), plain_names(module)
        return {plain(name): found[one] for name, one in module.named_parameters() if one in found}

    def put_waiting(self, gradients: dict[str, Tensor]) -> None:
        """Have the next backward add to the gradients that `waiting_gradients` gave."""
        module = self._lightning_module
        assert module is not None
        plain = plain_names(module)
        names = {one: plain(name) for name, one in module.named_parameters()}
        found = {one: gradients[name] for one, name in names.items() if name in gradients}
        put_back(module if self._root is None else self._root, found)

    def gradients_to_save(self, gradients: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Gradients as a checkpoint holds them: parts, or with "full" all of them on rank 0. Ranks: all.

        With "full" those that wait are averaged: their sum is that of the run that never stopped up to
        rounding.
        """
        if self.sharded:
            return gradients
        found: dict[str, Tensor] = dict(self._whole(gradients or {}))
        for name, one in self.waiting_gradients().items():
            mean = self.reduce(one, reduce_op="mean")
            if self.is_global_zero:
                found[name] = found[name] + mean.cpu() if name in found else mean.cpu()
        if not self.is_global_zero:
            return None
        return found if found or gradients is not None else None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights for a checkpoint: parts, or with "full" all of them on rank 0. Ranks: all."""
        state = super().lightning_module_state_dict()
        return state if self.sharded else self._whole(state)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state for a checkpoint: parts, or with "full" all of it on rank 0. Ranks: all."""
        state = super().optimizer_state(optimizer)
        return state if self.sharded else self._whole(state)

    def _whole(self, value: Any) -> Any:
        """The value with whole tensors in the place of parts, one after the other; empty but on rank 0."""
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            whole: Tensor = value.detach().full_tensor()  # type: ignore[attr-defined]
            return whole.cpu() if self.is_global_zero else torch.empty_like(whole, device="meta")
        if isinstance(value, dict):
            changed = {key: self._whole(one) for key, one in value.items()}
            if all(changed[key] is one for key, one in value.items()):
                return value
            made: Any = type(value)(changed) if type(value) is not dict else changed
            if hasattr(value, "_metadata"):
                made._metadata = value._metadata
            return made
        if type(value) in (list, tuple):
            return type(value)(self._whole(one) for one in value)
        return value
