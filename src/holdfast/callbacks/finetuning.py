"""Train with a part of the model frozen, and unfreeze it later, in param groups of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import Parameter
from torch.optim import Optimizer

from holdfast.callbacks.base import Callback
from holdfast.errors import CheckpointIncompatible, ConfigError
from holdfast.utilities.rank_zero import rank_zero_info, rank_zero_warn
from holdfast.utilities.wrapped_names import plain_names

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer

Modules = nn.Module | Iterable[Any]
"""A module, or modules nested in iterables to any depth."""


class BaseFinetuning(Callback):
    """Freeze in `freeze_before_training`, unfreeze epoch by epoch in `finetune_function`; define both.

    ``configure_optimizers`` runs in between and has to leave out what is frozen:
    ``SGD(filter(lambda p: p.requires_grad, self.parameters()), ...)``. `unfreeze_and_add_param_group` then
    adds a group to the optimizer.

    A run goes on exactly: param groups that were added, also by hand or in another hook, are there again
    before the optimizer's state is loaded, and what had been unfrozen is.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[dict[str, Any]]] = {}
        self._untracked: list[str] | None = None

    # -- to be defined ---------------------------------------------------------------------------------------

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze what shall not train from the beginning; called before the optimizers are made."""
        raise NotImplementedError(f"{type(self).__name__} must define freeze_before_training(pl_module).")

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what the epoch that begins shall train; called for each optimizer."""
        raise NotImplementedError(
            f"{type(self).__name__} must define finetune_function(pl_module, epoch, optimizer)."
        )

    # -- tools -----------------------------------------------------------------------------------------------

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """List every module inside that has parameters of its own or no module inside it."""
        if not isinstance(modules, nn.Module):
            return [one for part in modules for one in BaseFinetuning.flatten_modules(part)]
        return [one for one in modules.modules() if one._parameters or not any(True for _ in one.children())]

    @staticmethod
    def filter_params(
        modules: Modules, train_bn: bool = True, requires_grad: bool = True
    ) -> Iterator[Parameter]:
        """Yield the parameters that do, or do not, require gradients.

        Args:
            modules: Whose.
            train_bn: Whether those of batch norms are among them.
            requires_grad: Which of the two.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad is requires_grad:
                        yield parameter

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Have all parameters require gradients, and batch norms track their statistics."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trainable(module, True)

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze one module's own parameters, not those of modules inside it."""
        _set_trainable(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze modules and all inside them.

        Args:
            modules: What to freeze.
            train_bn: Leave batch norms trainable.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trainable(module, train_bn and isinstance(module, _BatchNorm))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[Parameter]) -> list[Parameter]:
        """List the parameters that the optimizer does not have yet; warn if it has some."""
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        given = list(params)
        new = [parameter for parameter in given if id(parameter) not in present]
        if len(new) < len(given):
            rank_zero_warn(
                f"{len(given) - len(new)} of {len(given)} unfrozen parameters are in the optimizer already "
                "and stay in their group. Make it of what is not frozen: "
                f"{type(optimizer).__name__}(filter(lambda p: p.requires_grad, self.parameters()), ...)."
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze modules and give their parameters to the optimizer, in a group of their own.

        Args:
            modules: What to unfreeze.
            optimizer: What trains them.
            lr: The group's learning rate; None takes the first group's, divided by ``initial_denom_lr``.
            initial_denom_lr: See there.
            train_bn: Whether parameters of batch norms go into the group.
        """
        BaseFinetuning.make_trainable(modules)
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # Batch norms that were never frozen are where they belong.
        norms = {
            id(parameter)
            for module in BaseFinetuning.flatten_modules(modules)
            if isinstance(module, _BatchNorm)
            for parameter in module.parameters(recurse=False)
        }
        parameters = BaseFinetuning.filter_on_optimizer(
            optimizer,
            (p for p in BaseFinetuning.filter_params(modules, train_bn) if id(p) not in norms & present),
        )
        if parameters:
            rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else lr
            optimizer.add_param_group({"params": parameters, "lr": rate})

    # -- when ------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze, before the optimizers are made."""
        if stage == "fit":
            self._untracked = None
            self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the batch norms track as they did when the checkpoint was written."""
        if self._untracked is None:
            return
        plain = plain_names(pl_module)
        for name, module in pl_module.named_modules():
            if isinstance(module, _BatchNorm):
                module.track_running_stats = plain(name) not in self._untracked

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Unfreeze what this epoch is to train."""
        for optimizer in trainer.optimizers:
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
        self._describe(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write down the groups as they are now, whoever added them."""
        self._describe(trainer, pl_module)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def on_restore_optimizers(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give the optimizers the param groups that the checkpoint's had.

        Raises:
            CheckpointIncompatible: A parameter in a group is not the model's.
        """
        state = (checkpoint.get("callbacks") or {}).get(self.state_key) or {}
        plain = plain_names(pl_module)
        parameters = {plain(name): parameter for name, parameter in pl_module.named_parameters()}
        names = {id(parameter): name for name, parameter in parameters.items()}
        for index, optimizer in enumerate(trainer.optimizers):
            groups = state.get("internal_optimizer_metadata", {}).get(index)
            now = [[names.get(id(one)) for one in group["params"]] for group in optimizer.param_groups]
            if groups is None or now == [group["params"] for group in groups]:
                continue
            strangers = [one for group in groups for one in group["params"] if one not in parameters]
            if strangers:
                raise CheckpointIncompatible(
                    f"In the checkpoint {type(self).__name__} had given optimizer {index} the parameter "
                    f"{strangers[0]!r}, which {type(pl_module).__name__} does not have. Resume with the "
                    "model that the run was started with."
                )
            optimizer.param_groups.clear()
            for group in groups:
                own = [parameters[name] for name in group["params"]]
                optimizer.add_param_group({**group, "params": own})
                for name, parameter in zip(group["params"], own, strict=True):
                    # Lightning's files don't say what was unfrozen; ours say it again when training starts.
                    parameter.requires_grad |= not any(name in before for before in now)

    def _describe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plain = plain_names(pl_module)
        names = {id(parameter): plain(name) for name, parameter in pl_module.named_parameters()}
        self._groups = {
            index: [
                # The parameters first, as in a group that is new: torch puts them last when it loads one.
                {"params": [], **group} | {"params": [names.get(id(one)) for one in group["params"]]}
                for group in optimizer.param_groups
            ]
            for index, optimizer in enumerate(trainer.optimizers)
        }
        self._untracked = [
            plain(name)
            for name, module in pl_module.named_modules()
            if isinstance(module, _BatchNorm) and not module.track_running_stats
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return each optimizer's groups with their parameters' names, as Lightning does, and the batch norms
        that don't track their statistics.
        """
        return {"internal_optimizer_metadata": self._groups, "untracked_batch_norms": self._untracked}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._groups = dict(state_dict["internal_optimizer_metadata"])
        self._untracked = state_dict.get("untracked_batch_norms")


def _set_trainable(module: nn.Module, trainable: bool) -> None:
    if isinstance(module, _BatchNorm):
        module.track_running_stats = trainable
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad = trainable


def multiplicative(epoch: int) -> float:
    """Double the backbone's learning rate in each epoch."""
    return 2.0


class BackboneFinetuning(BaseFinetuning):
    """Train with ``self.backbone`` frozen; from a given epoch on train it too, at a rate that grows.

    Args:
        unfreeze_backbone_at_epoch: The epoch that unfreezes it.
        lambda_func: From the number of the epoch after the one that begins to the factor by which the
            backbone's learning rate changes now.
        backbone_initial_ratio_lr: The backbone's first rate, as a part of the first group's.
        backbone_initial_lr: The backbone's first rate itself; None goes by the ratio.
        should_align: Never let the backbone's rate exceed the first group's.
        initial_denom_lr: Without effect, since the backbone's first rate is always known. In Lightning too.
        train_bn: Whether batch norms of the backbone that are in no group yet are unfrozen with it. They are
            left trainable until then, as in Lightning.
        verbose: Say the two rates in each epoch.
        rounding: To how many digits.

    Raises:
        ConfigError: When fit starts: the module has no ``backbone``.
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        self.previous_backbone_lr: float | None = None

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the backbone."""
        backbone = getattr(pl_module, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise ConfigError(
                f"BackboneFinetuning freezes self.backbone, but {type(pl_module).__name__} has no module of "
                "that name. Call it that, or derive from BaseFinetuning."
            )
        self.freeze(backbone)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze the backbone in its epoch; from then on change its rate."""
        current = optimizer.param_groups[0]["lr"]
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        if epoch == self.unfreeze_backbone_at_epoch or self.previous_backbone_lr is None:
            rate = self.backbone_initial_lr
            if rate is None:
                rate = current * self.backbone_initial_ratio_lr
            self.unfreeze_and_add_param_group(
                pl_module.backbone, optimizer, rate, self.initial_denom_lr, self.train_bn
            )
        else:
            rate = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            if self.should_align and rate > current:
                rate = current
            optimizer.param_groups[-1]["lr"] = rate
        self.previous_backbone_lr = rate
        if self.verbose:
            rank_zero_info(
                f"epoch {epoch}: learning rate {round(current, self.rounding)}, "
                f"the backbone's {round(rate, self.rounding)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and the backbone's rate."""
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
