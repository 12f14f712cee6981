"""In which number format a step computes: full, half or double precision, or autocast with loss scaling.

A precision has three parts that the loops look up once and then use at every step: ``context``, entered
around the model's step; ``scaler``, for the gradients; ``convert_input``, for a batch on its way to the
device. Full precision has none of them, so that it adds nothing to a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import LBFGS, Optimizer

from holdfast.errors import ConfigError
from holdfast.utilities.nested import mapped

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule

_SPELLINGS: dict[Any, str] = {
    None: "32-true",
    32: "32-true",
    "32": "32-true",
    16: "16-mixed",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    64: "64-true",
    "64": "64-true",
}
_NAMES = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")


class Precision:
    """Full precision: nothing is changed and nothing is added to the step.

    Subclass it for a format of your own: override `forward_context`, `convert_module`, `convert_input`,
    `optimizer_step` or how gradients are clipped, and hand it to ``Trainer(plugins=...)``.
    """

    precision: str = "32-true"
    scaler: Any = None
    """The gradient scaler; None where gradients are not scaled."""
    clip_norm: Callable[..., Any] = staticmethod(torch.nn.utils.clip_grad_norm_)
    """What cuts the norm of gradients; a strategy whose ranks hold parts of them puts its own here."""
    clip_value: Callable[..., Any] = staticmethod(torch.nn.utils.clip_grad_value_)
    """What cuts the values of parameters' gradients; likewise."""

    # -- what the loops look up once -------------------------------------------------------------------------

    @property
    def context(self) -> AbstractContextManager[Any] | None:
        """What is entered around every step, again and again; None where there is nothing to enter."""
        if type(self).forward_context.__module__ == __name__:
            return self._reusable_context()
        return _EachTime(self.forward_context)

    def _reusable_context(self) -> AbstractContextManager[Any] | None:
        return None

    @property
    def converts_input(self) -> bool:
        """Whether `convert_input` does anything."""
        return type(self).convert_input is not Precision.convert_input

    # -- contexts --------------------------------------------------------------------------------------------

    def forward_context(self) -> AbstractContextManager[Any]:
        """A context in which the model's steps compute as this precision says."""
        return nullcontext() if (context := self._reusable_context()) is None else context

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """A context in which new floating-point tensors have this precision's dtype."""
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """A context in which new modules have this precision's dtype."""
        return self.tensor_init_context()

    # -- conversion ------------------------------------------------------------------------------------------

    def convert_module(self, module: nn.Module) -> nn.Module:
        """The module in this precision's dtype; called once, before its weights are restored."""
        return module

    def convert_input(self, data: Any) -> Any:
        """A batch in this precision's dtype; integers and everything else stay as they are."""
        return data

    def convert_output(self, data: Any) -> Any:
        """What a step returned, for the world outside; here as it is."""
        return data

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Look at, or replace, what a fit is about to train with."""
        return model, optimizers, lr_schedulers

    # -- gradients -------------------------------------------------------------------------------------------

    def main_params(self, optimizer: Optimizer) -> Iterator[Parameter]:
        """The parameters of all of an optimizer's groups."""
        for group in optimizer.param_groups:
            yield from group["params"]

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by the loss scale, unless that was done since its last step."""

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: float | None = 0.0,
        gradient_clip_algorithm: str | None = "norm",
    ) -> None:
        """Clip an optimizer's gradients by "norm" or by "value"; 0 and None clip nothing.

        Raises:
            ConfigError: the algorithm is neither.
        """
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ConfigError(
                f"gradient_clip_algorithm must be 'norm' or 'value', found {gradient_clip_algorithm!r}."
            )
        if not clip_val or clip_val < 0:
            return
        self.unscale_gradients(optimizer)
        if gradient_clip_algorithm == "value":
            self.clip_grad_by_value(optimizer, clip_val)
        else:
            self.clip_grad_by_norm(optimizer, clip_val)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Scale the gradients down together, so that the norm of all of them is at most ``clip_val``."""
        self.clip_norm(list(self.main_params(optimizer)), clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Cut each gradient's values to the range from ``-clip_val`` to ``clip_val``."""
        self.clip_value(list(self.main_params(optimizer)), clip_val)

    # -- the step --------------------------------------------------------------------------------------------

    def optimizer_step(
        self,
        optimizer: Optimizer,
        model: LightningModule,
        closure: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step an optimizer: the closure, the hooks that look at the gradients, the step.

        Args:
            optimizer: The optimizer itself.
            model: Whose hooks run.
            closure: Runs forward and backward; None if that is done.
            kwargs: For ``optimizer.step``.
        """
        prepare = model.trainer.optimization.prepare_step
        if closure is None:
            prepare(optimizer)
            return optimizer.step(**kwargs)

        def closing() -> Any:
            result = closure()
            prepare(optimizer)
            return result

        return optimizer.step(closing, **kwargs)

    # -- state -----------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Key of this state in a checkpoint, Lightning's."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The gradient scaler's state; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the scaler back."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

    def teardown(self) -> None:
        """Called when a run is over."""


class MixedPrecision(Precision):
    """Autocast to float16, with a gradient scaler, or to bfloat16.

    Args:
        precision: "16-mixed" or "bf16-mixed".
        device: Device type to autocast for: "cpu", "cuda".
        scaler: A GradScaler of your own for "16-mixed".

    Raises:
        ConfigError: another precision, or a scaler for one that needs none.
    """

    def __init__(self, precision: str, device: str, scaler: Any = None) -> None:
        if precision not in ("16-mixed", "bf16-mixed"):
            raise ConfigError(
                f"MixedPrecision(precision={precision!r}): expected '16-mixed' or 'bf16-mixed'."
            )
        if precision == "bf16-mixed" and scaler is not None:
            raise ConfigError(
                f"MixedPrecision('bf16-mixed', scaler={type(scaler).__name__}): bfloat16 has the range of "
                "float32, so its gradients are not scaled. Leave scaler= out."
            )
        self.precision = precision
        self.device = device
        if precision == "16-mixed":
            self.scaler = torch.amp.GradScaler(device) if scaler is None else scaler

    def autocast_context_manager(self) -> torch.autocast:
        """The autocast that steps run under."""
        return torch.autocast(
            self.device, dtype=torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        )

    def _reusable_context(self) -> AbstractContextManager[Any]:
        return self.autocast_context_manager()

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by the loss scale, unless that was done since its last step."""
        if self.scaler is not None and _is_scaled(self.scaler, optimizer):
            self.scaler.unscale_(optimizer)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        model: LightningModule,
        closure: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step an optimizer; with a scaler on unscaled gradients, and not at all where they are not finite.

        Raises:
            ConfigError: LBFGS with a scaler: it evaluates the loss again in the middle of its step.
        """
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                "LBFGS does not work with precision='16-mixed': it evaluates the loss again in the middle of "
                "its step, where scaled gradients mean nothing. Use precision='bf16-mixed' or '32-true'."
            )
        without_loss = closure is not None and closure() is None and model.automatic_optimization
        if without_loss:
            model.trainer.optimization.prepare_step(optimizer)
            return None
        self.unscale_gradients(optimizer)
        model.trainer.optimization.prepare_step(optimizer)
        result = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return result


class _TruePrecision(Precision):
    """Everything floating-point in one dtype: weights, inputs, and what steps create."""

    dtype: torch.dtype

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return _DefaultDtype(self.dtype)

    def _reusable_context(self) -> AbstractContextManager[Any]:
        return _DefaultDtype(self.dtype)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module.to(dtype=self.dtype)

    def convert_input(self, data: Any) -> Any:
        return mapped(data, self._converted)

    def _converted(self, value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floats else value


class HalfPrecision(_TruePrecision):
    """Weights, inputs and all computation in float16 or bfloat16.

    Args:
        precision: "16-true" or "bf16-true".

    Raises:
        ConfigError: another precision.
    """

    precision: str = "16-true"

    def __init__(self, precision: str = "16-true") -> None:
        if precision not in ("16-true", "bf16-true"):
            raise ConfigError(f"HalfPrecision(precision={precision!r}): expected '16-true' or 'bf16-true'.")
        self.precision = precision
        self.dtype = torch.float16 if precision == "16-true" else torch.bfloat16


class DoublePrecision(_TruePrecision):
    """Weights, inputs and all computation in float64."""

    precision: str = "64-true"
    dtype = torch.float64


class _DefaultDtype(AbstractContextManager[None]):
    """A context in which torch's default dtype is another one; may be entered again, also within itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._before: list[torch.dtype] = []

    def __enter__(self) -> None:
        self._before.append(torch.get_default_dtype())
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self._before.pop())


class _EachTime(AbstractContextManager[None]):
    """One context that can be entered again and again, of a function that makes a new one each time."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._open: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._open.append(context)

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.pop().__exit__(*error)


def _is_scaled(scaler: Any, optimizer: Optimizer) -> bool:
    """Whether the optimizer's gradients still have the loss scale in them."""
    # GradScaler tells nobody; asked to unscale twice, it raises.
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    return getattr(stage, "name", "READY") == "READY"


def make_precision(precision: Any, device: torch.device) -> Precision:
    """The precision for an argument in any of its spellings.

    Raises:
        ConfigError: it is none of them.
    """
    name = _SPELLINGS.get(precision, precision) if precision.__hash__ else precision
    if name in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(name, device.type)
    if name in ("16-true", "bf16-true"):
        return HalfPrecision(name)
    if name == "64-true":
        return DoublePrecision()
    if name == "32-true":
        return Precision()
    advice = f"expected one of {', '.join(map(repr, _NAMES))}."
    if isinstance(name, str) and name.startswith("transformer-engine"):
        advice = "TransformerEngine is not supported. Use 'bf16-mixed' or 'bf16-true'."
    raise ConfigError(f"Trainer(precision={precision!r}): {advice}")
