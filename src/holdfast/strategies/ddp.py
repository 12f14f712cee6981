"""Data parallel training: every process has the model, and gradients are averaged before each step."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from holdfast.errors import ConfigError
from holdfast.strategies.environments import ClusterEnvironment
from holdfast.strategies.parallel import DEFAULT_TIMEOUT, ParallelStrategy
from holdfast.strategies.reducing import (
    broadcast_tensors,
    fix_order,
    join_with_zeros,
    learned_order,
    names_of,
    without_gradient,
)
from holdfast.strategies.sync_batchnorm import SyncedBatchNorms
from holdfast.strategies.trained_part import STEP, TrainedPart, trainable, untoggled
from holdfast.utilities.rank_zero import rank_zero_warn
from holdfast.utilities.unknown_names import unexpected_argument

if TYPE_CHECKING:
    from holdfast.accelerators.base import Accelerator
    from holdfast.checkpoint.checkpoint_io import CheckpointIO
    from holdfast.training.module import LightningModule
    from holdfast.training.precision import Precision
    from holdfast.training.trainer import Trainer


class DDPStrategy(ParallelStrategy):
    """Data parallel training by `torch.nn.parallel.DistributedDataParallel`.

    A run that goes on from a checkpoint with as many processes is bit-identical to the one that never
    stopped: it averages gradients in the same buckets (`reducing.fix_order`). With ``static_graph=True``
    torch lays these out behind the second step of each process, and nothing can be told it before. So there
    the first two steps after a resume may differ in the last bits, from three processes on.

    Args:
        accelerator: The kind of device; None lets the trainer choose.
        parallel_devices: This machine's devices, one for each of its processes; None lets the trainer choose.
        cluster_environment: What the launcher says; None finds it out.
        checkpoint_io: What writes and reads checkpoints; None for holdfast's own engine.
        precision_plugin: The number format; None lets the trainer's ``precision=`` decide.
        ddp_comm_state: What ``ddp_comm_hook`` is given besides each bucket. It is in no checkpoint.
        ddp_comm_hook: How a bucket of gradients is averaged, such as
            ``torch.distributed.algorithms.ddp_comm_hooks.default_hooks.fp16_compress_hook``.
        ddp_comm_wrapper: A function of that hook, whose result is used instead of it.
        model_averaging_period: None: averaging weights rather than gradients is not supported.
        process_group_backend: "gloo" or "nccl"; None takes nccl on GPUs and gloo elsewhere.
        timeout: After this time a process that waits for others in vain gives up.
        start_method: "popen": other processes of this machine run the same command.
        kwargs: What `DistributedDataParallel` takes, such as ``find_unused_parameters`` and ``static_graph``.
            With manual optimization ``find_unused_parameters`` is True unless it is given: a backward rarely
            reaches all of the model there.

    Raises:
        ArgumentError: `DistributedDataParallel` does not take one of ``kwargs``.
        ConfigError: ``model_averaging_period`` or another ``start_method``.
    """

    strategy_name = "ddp"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        ddp_comm_state: Any = None,
        ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None,
        model_averaging_period: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        start_method: str = "popen",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin,
            process_group_backend, timeout,
        )  # fmt: skip
        _check(kwargs, model_averaging_period, start_method)
        self._options = kwargs
        self._comm_hook = ddp_comm_hook if ddp_comm_wrapper is None else ddp_comm_wrapper(ddp_comm_hook)
        self._comm_state = ddp_comm_state
        self._wrapped: DistributedDataParallel | None = None
        self._synced_batchnorms: SyncedBatchNorms | None = None
        self._forget()

    def _forget(self) -> None:
        self._wrapped = None
        self._order: list[str] | None = None
        self._hooked = False
        self._part: TrainedPart | None = None
        self._trained: dict[str, nn.Parameter] = {}
        self._context: AbstractContextManager[Any] | None = None
        self.prepared_backward = self.adds_up_apart = False

    @property
    def model(self) -> Any:
        """The module as it is trained: wrapped during fit, and itself otherwise."""
        return self._lightning_module if self._wrapped is None else self._wrapped

    # -- wrapping --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        """Bring the module onto the device, and for a fit wrap it. Ranks: all.

        On return: weights and buffers are rank 0's on every process.

        Raises:
            ConfigError: ``sync_batchnorm=True`` on the CPU; ``static_graph=True`` with manual optimization;
                or the processes train different parameters.
        """
        module = trainer.lightning_module
        fits = trainer.state.fn == "fit"
        if fits and trainer.sync_batchnorm and self.world_size > 1:
            self._synced_batchnorms = SyncedBatchNorms(module, self.root_device)
        super().setup(trainer)
        self._forget()
        if not fits:
            return
        self._fit = next(_FITS)
        assert self._precision_plugin is not None
        self._context = self._precision_plugin.context
        self._manual = not module.automatic_optimization
        self._options_now = self._options_for(module)
        self._part = TrainedPart(module)
        self._wrap()

    def _options_for(self, module: LightningModule) -> dict[str, Any]:
        options = dict(self._options)
        if self._manual:
            if options.get("static_graph"):
                raise ConfigError(
                    f"DDPStrategy(static_graph=True) needs automatic optimization: {type(module).__name__} "
                    "runs backward inside of training_step, where torch cannot learn the graph. Leave it out."
                )
            options.setdefault("find_unused_parameters", True)
        elif options.get("static_graph") and self.world_size > 2:
            rank_zero_warn(
                f"DDPStrategy(static_graph=True) with {self.world_size} processes: the first two steps after "
                "a resume may differ in the last bits from those of a run that never stopped. Leave it out, "
                "and a resumed run is bit-identical."
            )
        if self._comm_state is not None:
            rank_zero_warn(
                "DDPStrategy(ddp_comm_state=...): what a communication hook keeps there is in no checkpoint, "
                "so a run that goes on is not bit-identical to one that never stopped."
            )
        return options

    @property
    def _syncs_buffers(self) -> bool:
        options = self._options
        given = options.get("forward_sync_buffers", options.get("broadcast_buffers"))
        return given is None or bool(given)

    def _wrap(self) -> None:
        """Wrap the parameters that require gradients by now. Ranks: all."""
        module, part = self._lightning_module, self._part
        assert module is not None and part is not None
        first = self._wrapped is None
        self._wrapped = None
        self._trained = trainable(module)
        self._compare_names()
        if not self._trained:
            return
        options = dict(self._options_now)
        if not first:
            options["init_sync"] = False  # they are equal, and a save may be copying them
        for parameter in self._trained.values():
            if options.get("gradient_as_bucket_view") and parameter.grad is not None:
                parameter.grad = parameter.grad.clone()  # not a view of a bucket that is gone
        with warnings.catch_warnings(), untoggled(self._trained.values()):
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            # Not told of its device: it would take batches apart to move them, and they are there already.
            wrapped = DistributedDataParallel(part, **options)
        if self._manual and "find_unused_parameters" not in self._options:
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified in DDP", UserWarning)
        self._wrapped, self._order, self._hooked = wrapped, None, False

    def _compare_names(self) -> None:
        """Make sure that all processes train the same parameters. Ranks: all.

        Raises:
            ConfigError: they do not; on every process.
        """
        mine = list(self._trained)
        theirs = self.broadcast(mine)
        if self.reduce_boolean_decision(mine == theirs):
            return
        here, there = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
        found = [
            f"{', '.join(names)} on rank {rank} only"
            for names, rank in ((there, 0), (here, self.global_rank))
            if names
        ]
        if mine != theirs:
            where = (
                f"rank {self.global_rank} and rank 0 differ: {'; '.join(found) or 'they have another order'}"
            )
        else:
            where = "another rank differs from rank 0, and its error names what"
        raise ConfigError(
            f"The ranks of this job do not train the same parameters; {where}. Build, freeze and unfreeze "
            "the model alike on all of them."
        )

    def _wrap_if_changed(self) -> None:
        if self._lightning_module is None or self._part is None:
            return
        now, known = trainable(self._lightning_module), self._trained
        changed = now.keys() != known.keys() or any(now[name] is not known[name] for name in now)
        if self.reduce_boolean_decision(changed, all=False):
            self._wrap()

    def on_train_epoch_start(self) -> None:
        """Wrap anew where hooks have frozen or unfrozen parameters, or replaced them."""
        self._wrap_if_changed()
        self._register_hook()

    def resume_training(self, *, inside_window: bool, reduction_order: Sequence[str] | None = None) -> None:
        """Wrap anew where the checkpoint's run trained other parameters; average as it did; go on inside of
        its window.
        """
        self._wrap_if_changed()
        wrapped = self._wrapped
        if wrapped is None:
            return
        order = list(reduction_order or ())
        if self._order is None and self._learns_order and sorted(order) == sorted(names_of(wrapped)):
            fix_order(wrapped, order)
            self._order = order
        if inside_window:
            # The wrapper broadcasts buffers once in a window, before its first batch.
            wrapped.require_forward_param_sync = False
        self._register_hook()

    @property
    def _learns_order(self) -> bool:
        wrapped = self._wrapped
        return wrapped is not None and not wrapped.find_unused_parameters and not wrapped.static_graph

    def reduction_order(self) -> list[str] | None:
        """The order of gradients in their buckets, which torch finds out at the first step. Ranks: all."""
        if self._order is None and self._learns_order:
            assert self._wrapped is not None
            self._order = learned_order(self._wrapped)
        return self._order

    def _register_hook(self) -> None:
        # Behind `fix_order`, which nobody's code has a part in.
        if self._comm_hook is not None and self._wrapped is not None and not self._hooked:
            self._wrapped.register_comm_hook(self._comm_state, self._comm_hook)
            self._hooked = True

    def teardown(self) -> None:
        """Unwrap the module."""
        if self._synced_batchnorms is not None:
            self._synced_batchnorms.revert()
            self._synced_batchnorms = None
        self._forget()
        super().teardown()

    # -- a step ----------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, through the wrapper, in the run's number format."""
        if self._context is None:
            return self._forward(args, kwargs)
        with self._context:
            return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wrapped, module = self._wrapped, self._lightning_module
        assert module is not None
        if wrapped is None or self._manual:
            # In manual optimization `prepare_backward` does what the wrapper's forward would do too early.
            if self._syncs_buffers:
                self._broadcast_buffers()
            return module.training_step(*args, **kwargs)
        try:
            return wrapped(STEP, *args, **kwargs)
        except RuntimeError as error:
            self._explain(error)
            raise

    def prepare_backward(self, loss: torch.Tensor) -> None:
        """Have the gradients of this backward averaged, unless `block_backward_sync` is in force."""
        self.prepared_backward = True
        wrapped = self._wrapped
        if wrapped is None:
            return
        self.adds_up_apart = not wrapped.require_backward_grad_sync
        if self.adds_up_apart:
            return
        self.check_gradients()
        wrapped.reducer.prepare_for_backward([loss] if wrapped.find_unused_parameters else [])

    def join_without_loss(self, *, counts: bool) -> torch.Tensor | None:
        """Take part in the others' averaging; if no process had a loss, this was no step.

        Raises:
            ConfigError: with ``static_graph=True``, where every step has to be like the first.
        """
        wrapped, module = self._wrapped, self._lightning_module
        if wrapped is None or not wrapped.require_backward_grad_sync or self.world_size == 1:
            return None
        assert module is not None
        if wrapped.static_graph:
            raise ConfigError(
                f"{type(module).__name__}.training_step returned None on rank {self.global_rank}, and "
                "DDPStrategy(static_graph=True) needs a loss from every rank at every step. Leave it out."
            )
        counts = counts and all(parameter.grad is None for parameter in self._trained.values())
        store = dist.distributed_c10d._get_default_store()
        key = f"holdfast/without_loss/{self._fit}/{module.trainer.progress.total_batches}"
        if counts:
            # Before the averaging: when that is done, everybody without a loss has said so.
            store.add(key, 1)
        join_with_zeros(wrapped)
        if counts:
            if self.root_device.type == "cuda":
                torch.cuda.synchronize(self.root_device)
            if store.add(key, 0) == self.world_size:
                for parameter in self._trained.values():
                    parameter.grad = None
                return None
        return torch.zeros((), device=self.root_device)

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """A context in which backward adds up gradients in each process, without averaging them."""
        return nullcontext() if self._wrapped is None else self._wrapped.no_sync()

    def check_gradients(self) -> None:
        """Make sure that the gradients of the last step were averaged: the loss has to depend on all of the
        model.

        Raises:
            ConfigError: parameters were left out, and ``find_unused_parameters`` is False.
        """
        if self._wrapped is not None:
            try:
                self._wrapped.reducer._check_reducer_finalized()
            except RuntimeError as error:
                self._explain(error)
                raise

    def _explain(self, error: RuntimeError) -> None:
        """Raise an error that names parameters, where torch's is about those that a step did not use."""
        assert self._wrapped is not None
        names = without_gradient(self._wrapped, error)
        if names is None:
            return
        what = f"{len(names)} parameters that require" if len(names) != 1 else "a parameter that requires"
        raise ConfigError(
            f"The loss of {type(self._lightning_module).__name__}.training_step did not depend on {what} "
            f"gradients: {', '.join(names)}. With several processes each must get a gradient at every step. "
            "Freeze what is not trained (requires_grad = False), or use "
            "Trainer(strategy='ddp_find_unused_parameters_true')."
        ) from error

    # -- buffers ---------------------------------------------------------------------------------------------

    def _broadcast_buffers(self) -> None:
        module = self._lightning_module
        if module is not None and self.world_size > 1:
            ignored = getattr(self._part, "_ddp_params_and_buffers_to_ignore", ())
            broadcast_tensors(
                buffer for name, buffer in module.named_buffers() if f"module.{name}" not in ignored
            )

    def on_validation_epoch_start(self) -> None:
        """Have every process validate rank 0's buffers, averaged ones too: those are the ones saved."""
        if self._part is not None and self._syncs_buffers:
            self._broadcast_buffers()

    def on_train_end(self) -> None:
        """Leave the same model on every process."""
        self.check_gradients()
        if self._part is not None and self._syncs_buffers:
            self._broadcast_buffers()

    def keeps_buffers_equal(self, *, inside_window: bool) -> bool:
        """Whether rank 0's buffers are broadcast before the next forward of training."""
        return self._syncs_buffers and not inside_window


_FITS = itertools.count()


def _check(options: dict[str, Any], model_averaging_period: int | None, start_method: str) -> None:
    known = [*inspect.signature(DistributedDataParallel.__init__).parameters][2:]
    for name in options:
        if name not in known:
            raise unexpected_argument("DDPStrategy", name, known)
    if model_averaging_period is not None:
        raise ConfigError(
            f"DDPStrategy(model_averaging_period={model_averaging_period!r}) is not supported: gradients are "
            "averaged at every step. Leave it out."
        )
    if start_method != "popen":
        raise ConfigError(
            f"DDPStrategy(start_method={start_method!r}): expected 'popen': the other processes run the same "
            "command as this one."
        )
