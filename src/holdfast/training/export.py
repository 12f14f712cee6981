"""A module as a program that runs without holdfast, or without Python: TorchScript and ONNX."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from holdfast.errors import ConfigError
from holdfast.utilities.nested import move_to_device


class Exportable:
    """The ways out of a `LightningModule`: each compiles ``forward`` alone, in evaluation mode."""

    example_input_array: Any

    # What TorchScript shall not compile.
    __jit_unused_properties__: ClassVar[list[str]] = [
        "current_epoch", "device", "dtype", "global_rank", "global_step", "hparams", "hparams_initial",
        "local_rank", "logger", "loggers", "on_gpu", "trainer",
    ]  # fmt: skip

    def to_torchscript(
        self,
        file_path: str | os.PathLike[str] | None = None,
        method: str | None = "script",
        example_inputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return ``forward`` as a TorchScript program.

        Args:
            file_path: Where to save it too.
            method: "script" compiles the code, "trace" records what it does with ``example_inputs``.
            example_inputs: What "trace" calls ``forward`` with; default: ``example_input_array``.
            kwargs: Arguments for `torch.jit.script` or `torch.jit.trace`.

        Raises:
            ConfigError: another method, or nothing to trace with.
        """
        if method not in ("script", "trace", None):
            raise ConfigError(f"to_torchscript(method={method!r}): expected 'script' or 'trace'.")
        if method == "trace":
            sample = self._sample(example_inputs, "example_inputs", "to_torchscript(method='trace')")
            with _evaluating(self):
                program = torch.jit.trace(func=self, example_inputs=sample, **kwargs)
        else:
            with _evaluating(self):
                program = torch.jit.script(self, **kwargs)
        if file_path is not None:
            with open(file_path, "wb") as file:
                torch.jit.save(program, file)
        return program

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Export ``forward`` as ONNX; the packages onnx and onnxscript have to be installed.

        Args:
            file_path: Where to, or a file object; None returns the program alone.
            input_sample: What to call ``forward`` with, a tuple for several arguments; default:
                ``example_input_array``.
            kwargs: Arguments for `torch.onnx.export`.

        Raises:
            ConfigError: a package is missing, or there is no input.
        """
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"to_onnx needs the packages onnx and onnxscript, and {error.name} is not installed: "
                "pip install onnx onnxscript."
            ) from None
        sample = self._sample(input_sample, "input_sample", "to_onnx")
        target = os.fspath(file_path) if isinstance(file_path, os.PathLike) else file_path
        with _evaluating(self):
            inputs = sample if isinstance(sample, tuple) else (sample,)
            return torch.onnx.export(self, inputs, target, **kwargs)  # type: ignore[arg-type]

    def to_tensorrt(self, *args: Any, **kwargs: Any) -> Any:
        """Not there.

        Raises:
            ConfigError: always; the message says what to use.
        """
        raise ConfigError(
            f"{type(self).__name__}.to_tensorrt is not there. Compile the module with "
            "torch_tensorrt.compile(model.eval(), ...), or build an engine from the file of to_onnx."
        )

    def _sample(self, given: Any, argument: str, method: str) -> Any:
        """What to call ``forward`` with, on the module's device.

        Raises:
            ConfigError: nobody gives one.
        """
        sample = self.example_input_array if given is None else given
        if sample is None:
            raise ConfigError(
                f"{type(self).__name__}.{method} needs an input to run forward on: give {argument}=, or set "
                "self.example_input_array in __init__."
            )
        return move_to_device(sample, self.device)  # type: ignore[attr-defined]


class _NoTrainer:
    """Stands in for a trainer: TorchScript reads every property of a class, and some need one."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _evaluating(module: Any) -> Iterator[None]:
    """The module in evaluation mode and without its trainer; afterwards each part of it is as it was."""
    modes = {child: child.training for child in module.modules()}
    trainer, results = module._trainer, module._results
    module._trainer, module._results = _NoTrainer(), None
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module._trainer, module._results = trainer, results
        for child, mode in modes.items():
            child.training = mode
