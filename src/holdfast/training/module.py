"""`LightningModule`: a model together with how it is trained, as Lightning's users write it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from holdfast.errors import ConfigError
from holdfast.training.class_only import class_only_method
from holdfast.training.export import Exportable
from holdfast.training.hooks import CheckpointHooks, DataHooks, ModuleHooks
from holdfast.training.hparams import HyperparametersMixin
from holdfast.training.results import Results
from holdfast.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from holdfast.training.optimizer import LightningOptimizer
    from holdfast.training.trainer import Trainer


class LightningModule(ModuleHooks, DataHooks, CheckpointHooks, Exportable, HyperparametersMixin, nn.Module):
    """A model that says how it is trained: override ``training_step``, ``configure_optimizers`` and hooks.

    Everything that `torch.nn.Module` is, it is too. Source: the names and their meaning are PyTorch
    Lightning's.
    """

    # TorchScript reads the annotations of the first class that has any, and knows few types.
    __annotations__ = {"training": bool}

    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trainer: Trainer | None = None
        self._results: Results | None = None
        self.automatic_optimization = True
        self.strict_loading = True
        self.example_input_array: Any = None

    # -- the steps and what they are made of ---------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `torch.nn.Module.forward`."""
        return super().forward(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch: a tensor, or a dict with "loss", or None to skip the batch."""

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute and log what validation wants to know of a batch."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute and log what the test wants to know of a batch."""

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the predictions for a batch; by default what ``forward`` returns for it."""
        return self(args[0] if args else kwargs["batch"])

    def configure_optimizers(self) -> Any:
        """Return optimizers, alone or with their schedulers, in any of Lightning's documented forms."""

    def configure_callbacks(self) -> Any:
        """Return callbacks that belong to this model; they replace the trainer's of the same type."""
        return []

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients; override for anything but ``loss.backward()``."""
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step an optimizer; ``optimizer_closure`` runs the training step and backward and must be called."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients at the start of an accumulation window."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Step a scheduler; ``metric`` is the monitored value for ReduceLROnPlateau, else None."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients before an optimizer's step; override to clip in your own way."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of an optimizer's parameters by "norm" (default) or by "value".

        Raises:
            ConfigError: the algorithm is neither.
        """
        self.trainer.optimization.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # -- logging -------------------------------------------------------------------------------------------

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log one value under ``name``; costs no wait for the device.

        Args:
            name: Its name; with several evaluation loaders ``/dataloader_idx_<i>`` is added.
            value: A number, a tensor with one element, or a TorchMetrics object.
            prog_bar: Show it in the progress bar.
            logger: Send it to the loggers (default yes).
            on_step: Log the value of each step. The default depends on the hook.
            on_epoch: Log the value reduced over the epoch. The default depends on the hook.
            reduce_fx: "mean" (weighted by batch size), "sum", "min" or "max".
            enable_graph: Accepted; values are always detached.
            sync_dist: Reduce over processes: the epoch's value when the epoch ends, a step's at those steps
                that are sent to the loggers. Without it each process has its own, and rank 0's is logged.
            sync_dist_group: The process group for it; None for all processes.
            add_dataloader_idx: Whether the loader's index is added to the name.
            batch_size: Weight of the value in the mean; found from the batch when None.
            metric_attribute: Accepted; not needed here.
            rank_zero_only: Log on rank 0 alone, whose own value it is: nothing is reduced. A TorchMetrics
                object has to be logged on every rank all the same.

        Raises:
            ConfigError: it cannot be logged here, or not with these arguments.
        """
        results = self._results
        if results is None:
            self._say_not_logged(name)
            return
        asked = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, add_dataloader_idx, sync_dist, sync_dist_group,
            rank_zero_only,
        )  # fmt: skip
        results.log(name, value, asked, batch_size)

    def _say_not_logged(self, name: str) -> None:
        barebones = self._trainer is not None and self._trainer.barebones
        where = "under Trainer(barebones=True)" if barebones else "outside of a Trainer's run"
        warn_once(
            ("not logged", barebones), f"self.log({name!r}, ...) was called {where}; the value is not kept."
        )

    def log_dict(
        self,
        dictionary: Mapping[str, Any],
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log every item of a dict (or MetricCollection), each as `log` would with the other arguments."""
        for name, value in dictionary.items():
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist,
                sync_dist_group, add_dataloader_idx, batch_size, rank_zero_only=rank_zero_only,
            )  # fmt: skip

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once per job, above the progress bar if there is one."""
        self.trainer.print(*args, **kwargs)

    # -- manual optimization -------------------------------------------------------------------------------

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of them; wrapped so that steps are counted, unless told otherwise."""
        found: list[Any] = list(
            self.trainer.wrapped_optimizers if use_pl_optimizer else self.trainer.optimizers
        )
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """The scheduler, or the list of them, or None."""
        found = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return None if not found else found[0] if len(found) == 1 else found

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward for manual optimization: scales the loss as the precision demands and calls the hooks.

        Raises:
            ConfigError: the module optimizes automatically.
        """
        if self.automatic_optimization:
            raise ConfigError(
                "self.manual_backward(loss) needs self.automatic_optimization = False in __init__."
            )
        self.trainer.optimization.backward(loss, *args, **kwargs)

    def toggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Let only this optimizer's parameters require gradients, until `untoggle_optimizer`."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._toggled: dict[nn.Parameter, bool] = {}
        for other in self.trainer.optimizers:
            for group in other.param_groups:
                for parameter in group["params"]:
                    if parameter not in self._toggled:
                        self._toggled[parameter] = parameter.requires_grad
                        parameter.requires_grad = parameter.requires_grad and id(parameter) in mine

    def untoggle_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> None:
        """Undo `toggle_optimizer`."""
        for parameter, required in getattr(self, "_toggled", {}).items():
            parameter.requires_grad = required
        self._toggled = {}

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer | LightningOptimizer) -> Iterator[None]:
        """`toggle_optimizer` for the length of a block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # -- where it is ---------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The trainer that runs this module.

        Raises:
            RuntimeError: it is not attached to one.
        """
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__qualname__} is not attached to a `Trainer`.")
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self._trainer = trainer

    @property
    def current_epoch(self) -> int:
        """The epoch that is running, from 0; 0 without a trainer."""
        return 0 if self._trainer is None else self._trainer.current_epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps done so far; 0 without a trainer."""
        return 0 if self._trainer is None else self._trainer.global_step

    @property
    def global_rank(self) -> int:
        """Rank of this process in the job."""
        return 0 if self._trainer is None else self._trainer.global_rank

    @property
    def local_rank(self) -> int:
        """Rank of this process on its machine."""
        return 0 if self._trainer is None else self._trainer.local_rank

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return None if self._trainer is None else self._trainer.logger

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return [] if self._trainer is None else self._trainer.loggers

    @property
    def device(self) -> torch.device:
        """The device of the first parameter or buffer; the CPU if there is none."""
        first = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        for tensor in self.parameters():
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    @property
    def on_gpu(self) -> bool:
        """True if the module is on a CUDA device."""
        return self.device.type == "cuda"

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather tensors from every process, stacked by rank; with one process, the data as it is.

        Ranks: all, with tensors of the same shapes. Blocks: until all have given theirs.

        Args:
            data: A tensor or a number, or tuples, lists and dicts of them; what else is in them stays.
            group: The process group; None for all processes.
            sync_grads: Let gradients flow back to the process that each tensor came from.

        Returns:
            The same nesting; each tensor has the processes as its first dimension.
        """
        if self._trainer is None or self._trainer.world_size == 1:
            return data
        return self._trainer.strategy.all_gather(data, group=group, sync_grads=sync_grads)

    def freeze(self) -> None:
        """Make every parameter need no gradient, and evaluate."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        self.eval()

    def unfreeze(self) -> None:
        """Make every parameter need its gradient, and train."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        self.train()

    # -- checkpoints ---------------------------------------------------------------------------------------

    @class_only_method
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        which_weights: Literal["averaged", "raw"] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the module a checkpoint was saved from and load its weights, every byte checked first.

        Optimizer state is not read into memory.

        Args:
            checkpoint_path: Path, URL, or file opened with mode "rb", of holdfast's, of Lightning's of any
                era, or of ``torch.save`` with a ``state_dict``.
            map_location: Device, mapping of devices or function, as `torch.load` takes it. None means the
                device that the weights were saved on where this machine has it, else the CPU.
            hparams_file: A .yaml or .csv file with hyperparameters to use instead of the saved ones.
            strict: Whether every key must match; None means the module's ``strict_loading``.
            weights_only: Accepted for Lightning's sake: opening a checkpoint never runs code.
            which_weights: "averaged" or "raw", where a callback kept an average beside the weights that
                train. None takes what is under ``state_dict``: with WeightAveraging the average, with
                StochasticWeightAveraging the weights that train, and the average once training has ended.
            kwargs: Arguments of ``__init__`` that win over the saved ones.

        Raises:
            CheckpointNotFound: there is no such file; the message has the nearest names.
            CheckpointIncomplete: it is not a whole checkpoint.
            CheckpointCorrupt: a byte of it is not what was written; the message names the tensor.
            CheckpointIncompatible: parameters are missing, unexpected or of another shape; all are listed.
                Or it does not hold the weights that ``which_weights`` asks for.
        """
        from holdfast.training.loading import build_from_checkpoint

        built: Self = build_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, strict, kwargs, which_weights
        )
        return built

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model does not drag the trainer along.
        state = dict(self.__dict__)
        state["_trainer"] = None
        state["_results"] = None
        # Nor what model.compile() made: it would call the original.
        state.pop("_compiled_call_impl", None)
        return state
