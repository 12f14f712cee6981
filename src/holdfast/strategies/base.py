"""Where the model lives, how the processes of a job agree, and what of a run can be overridden there.

A strategy that overrides nothing is asked a few questions when a run starts and is not in the way of a step.
What a subclass overrides is looked up once, when a run starts, and called from then on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from holdfast.checkpoint.checkpoint_io import CheckpointIO, TorchCheckpointIO
from holdfast.utilities.optimizer_state import load_optimizer_state

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from holdfast.accelerators.base import Accelerator
    from holdfast.strategies.agreement import Agreement
    from holdfast.training.module import LightningModule
    from holdfast.training.precision import Precision
    from holdfast.training.trainer import Trainer

T = TypeVar("T")


class Strategy(ABC):
    """Processes, devices and agreement between them. Subclass it, or one of its subclasses, for your own.

    Args:
        accelerator: The kind of device; None lets the trainer choose.
        checkpoint_io: What writes and reads checkpoints; None for holdfast's own engine.
        precision_plugin: The number format; None lets the trainer's ``precision=`` decide.
    """

    strategy_name = "custom"
    sharded: bool = False
    """Whether a checkpoint is a directory to which every rank adds its part."""
    shards_model: bool = False
    """Whether each rank holds a part of every weight alone."""
    agreement: Agreement | None = None
    """What ranks agree on without a collective per step; None with one process."""
    alone = False
    """Whether the other processes are left out of what is exchanged: they have failed, or wait."""

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._checkpoint_io = checkpoint_io
        self._precision_plugin = precision_plugin
        self.given = checkpoint_io, precision_plugin
        """What it was given itself; a trainer adds its own, and the next one starts from these again."""
        self._lightning_module: LightningModule | None = None

    # -- its parts -------------------------------------------------------------------------------------------

    @property
    def accelerator(self) -> Accelerator | None:
        """The kind of device; None until a trainer has this strategy."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator

    @property
    def own_checkpoint_io(self) -> CheckpointIO | None:
        """The checkpoint plugin that it was given; None where holdfast's engine saves."""
        return self._checkpoint_io

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes and reads checkpoints: the plugin that it was given, or the engine behind it."""
        return TorchCheckpointIO() if self._checkpoint_io is None else self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO | None) -> None:
        self._checkpoint_io = checkpoint_io
        self.given = checkpoint_io, self.given[1]

    @property
    def precision_plugin(self) -> Precision | None:
        """The number format; None until a trainer has this strategy."""
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._precision_plugin = precision_plugin
        self.given = self.given[0], precision_plugin

    def take(self, checkpoint_io: CheckpointIO | None, precision_plugin: Precision) -> None:
        """Work with what a trainer found for it; what it was given itself stays known."""
        self._checkpoint_io, self._precision_plugin = checkpoint_io, precision_plugin

    @property
    def lightning_module(self) -> LightningModule | None:
        """The module of the current or last run."""
        return self._lightning_module

    @property
    def model(self) -> Any:
        """The module as it is trained: itself, or what the strategy wraps it in."""
        return self._lightning_module

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers of the current or last fit."""
        module = self._lightning_module
        return [] if module is None or module._trainer is None else module._trainer.optimizers

    # -- who and where ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def root_device(self) -> torch.device:
        """This process's device."""

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices of this machine's processes."""
        return [self.root_device]

    @property
    def global_rank(self) -> int:
        """Rank of this process in the job."""
        return 0

    @property
    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return 0

    @property
    def node_rank(self) -> int:
        """Rank of this machine in the job."""
        return 0

    @property
    def world_size(self) -> int:
        """Processes in the job."""
        return 1

    @property
    @abstractmethod
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes and speaks for all."""

    # -- agreement -------------------------------------------------------------------------------------------

    @abstractmethod
    def barrier(self, name: str | None = None) -> None:
        """Wait until every process is here. Ranks: all. Blocks: until the last one arrives."""

    @abstractmethod
    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return rank ``src``'s object. Ranks: all. Blocks: until it has arrived."""

    @abstractmethod
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the value reduced over all processes. Ranks: all. Blocks: until all have given theirs."""

    @abstractmethod
    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return every process's tensor. Ranks: all. Blocks: until all have given theirs."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all (or any) processes said True. Ranks: all. Blocks: until all have said."""
        return decision

    # -- a run, in this order --------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        """Take note of the module that is about to run."""
        self._lightning_module = model

    def setup_environment(self) -> None:
        """Make this process ready: its device, and where there are others, the connection to them."""
        if self._accelerator is not None:
            self._accelerator.setup_device(self.root_device)

    def setup(self, trainer: Trainer) -> None:
        """Bring the module into the run's number format and onto the device, before weights are restored."""
        if self._accelerator is not None:
            self._accelerator.setup(trainer)
        module = trainer.lightning_module
        if self._precision_plugin is not None:
            self._precision_plugin.convert_module(module)
        self.model_to_device()

    def after_request(self, trainer: Trainer, serve: Callable[[Any], None]) -> None:
        """Called when fit, validate, test or predict is over, and it went well.

        Args:
            trainer: Whose request it was.
            serve: Does this process's part of what rank 0 asks for, should it wait for rank 0 here.
        """

    def explain(self, error: BaseException) -> BaseException:
        """What really ended a request: the error, or what another process did that is behind it."""
        return error

    @property
    def cut_off(self) -> bool:
        """Whether other processes cannot be reached any more, since the job has failed."""
        return False

    def model_to_device(self) -> None:
        """Move the module to this process's device."""
        if self._lightning_module is not None:
            self._lightning_module.to(self.root_device)

    def teardown(self) -> None:
        """Finish what its parts have under way; called when a run is over, however it ended."""
        if self._precision_plugin is not None:
            self._precision_plugin.teardown()
        if self._checkpoint_io is not None:
            self._checkpoint_io.teardown()
        if self._accelerator is not None:
            self._accelerator.teardown()

    # Called after the module's and the callbacks' hooks of these names.
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...

    def process_dataloader(self, dataloader: Any) -> Any:
        """What the run reads instead of a loader, such as a wrapper of it; asked once for each loader."""
        return dataloader

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Whether it counts batches between steps itself; here the loop does."""
        return False

    def call_others(self, request: Any) -> AbstractContextManager[bool]:
        """Have processes that wait for this one do a part of what follows; the context gives whether they do.

        Args:
            request: What `after_request` is to serve in each of them.
        """
        return nullcontext(False)

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """A context for a backward behind which no step comes yet: processes need not agree on gradients."""
        return nullcontext()

    adds_up_apart = False
    """Whether there are gradients that processes have added up by themselves and not averaged yet."""

    def prepare_backward(self, loss: torch.Tensor) -> None:
        """Called before each backward of manual optimization."""

    def join_without_loss(self, *, counts: bool) -> torch.Tensor | None:
        """Called instead of backward where ``training_step`` gave no loss: others may be waiting.

        Args:
            counts: If nobody has a loss, no gradient may be left behind.

        Returns:
            A loss of 0 if the optimizer is to step all the same.
        """

    def check_gradients(self) -> None:
        """Make sure that all processes have the gradients of the last step; before anything is saved."""

    def gradients_to_save(self, gradients: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """Gradients as a checkpoint holds them. Ranks: all."""
        return gradients

    def reduction_order(self) -> list[str] | None:
        """In which order gradients are averaged, if that is for a run that goes on to know. Ranks: all."""
        return None

    def resume_training(self, *, inside_window: bool, reduction_order: Sequence[str] | None = None) -> None:
        """Called when all of a checkpoint is in place, just before the first batch.

        Args:
            inside_window: Gradients of earlier batches wait for those of the next ones.
            reduction_order: What `reduction_order` gave in the run that it was saved by.
        """

    def keeps_buffers_equal(self, *, inside_window: bool) -> bool:
        """Whether buffers are, or are made to be before their next use, rank 0's everywhere."""
        return True

    def gather(self, obj: T, dst: int = 0) -> list[T] | None:
        """Return every process's object, by rank, on rank ``dst``; None elsewhere. Ranks: all."""
        return [obj]

    # -- a step ----------------------------------------------------------------------------------------------

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch to the device, by the module's ``transfer_batch_to_device``."""
        assert self._lightning_module is not None
        return self._lightning_module.transfer_batch_to_device(
            batch, device or self.root_device, dataloader_idx
        )

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step in the run's number format."""
        return self._step("training_step", args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step in the run's number format."""
        return self._step("validation_step", args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step in the run's number format."""
        return self._step("test_step", args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step in the run's number format."""
        return self._step("predict_step", args, kwargs)

    def _step(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        precision = self._precision_plugin
        with nullcontext() if precision is None else precision.forward_context():
            return getattr(self._lightning_module, name)(*args, **kwargs)

    def backward(
        self, closure_loss: torch.Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Backward with its hooks, on the scaled loss where the number format has a scaler."""
        assert self._lightning_module is not None
        self._lightning_module.trainer.optimization.run_backward(closure_loss, *args, **kwargs)
        return closure_loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any] | None,
        model: LightningModule | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step an optimizer as the number format demands; the closure runs forward and backward."""
        module, precision = model or self._lightning_module, self._precision_plugin
        assert module is not None and precision is not None
        return precision.optimizer_step(optimizer, module, closure, **kwargs)

    # -- where tensors are made ------------------------------------------------------------------------------

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """A context in which new tensors are on the device and in the run's number format.

        Args:
            empty_init: Leave a module's weights uninitialised, because they are going to be loaded.
        """
        with ExitStack() as contexts:
            contexts.enter_context(self.root_device)
            if self._precision_plugin is not None:
                contexts.enter_context(self._precision_plugin.tensor_init_context())
            if empty_init:
                contexts.enter_context(_WithoutInit())
            yield

    # -- checkpoints -----------------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether a resume restores the optimizers; a subclass may say no."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's weights for a checkpoint."""
        assert self._lightning_module is not None
        return self._lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state for a checkpoint."""
        return optimizer.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Put a checkpoint's weights into the module."""
        assert self._lightning_module is not None
        self._lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Put a checkpoint's optimizer states into the optimizers."""
        assert self._lightning_module is not None
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_optimizer_state(optimizer, state, self._lightning_module, checkpoint["state_dict"])

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint. Ranks: all; only the one that speaks for all writes."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint."""
        found: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        return found

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint. Ranks: all; only the one that speaks for all deletes."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)


class _WithoutInit(TorchFunctionMode):
    """Functions of `torch.nn.init` give the tensor back as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
