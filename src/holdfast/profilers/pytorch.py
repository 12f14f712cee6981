"""Which operations each action ran, on the CPU and on the GPU, by torch's own profiler."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from holdfast.errors import ConfigError
from holdfast.profilers.base import Profiler
from holdfast.utilities.rank_zero import rank_zero_warn

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class PyTorchProfiler(Profiler):
    """Runs `torch.profiler` over a run; each action is a labelled range in its trace.

    Args:
        dirpath: Directory of its files; None for the first logger's directory.
        filename: Name of the report's file, without its ending; None writes the report to the log instead.
        group_by_input_shapes: Count an operation apart for each shape of its inputs.
        emit_nvtx: Label ranges for NVIDIA's profilers instead: run the script under ``nsys profile``.
        export_to_chrome: Also write a trace that a browser's trace viewer and Perfetto show.
        row_limit: Rows of the table; -1 for all.
        sort_by_key: Column to sort by; the total time of the GPU, or of the CPU where there is none.
        record_module_names: Label the forward pass of each submodule with its class, too.
        table_kwargs: Further arguments of the table.
        profiler_kwargs: Arguments of `torch.profiler.profile`, such as ``schedule=`` or ``profile_memory=``.

    Raises:
        ConfigError: there is no such column; when a run starts: ``emit_nvtx`` without a GPU.
    """

    AVAILABLE_SORT_KEYS = frozenset(
        {
            "count",
            "cpu_memory_usage",
            "cpu_time",
            "cpu_time_total",
            "cuda_memory_usage",
            "cuda_time",
            "cuda_time_total",
            "self_cpu_memory_usage",
            "self_cpu_time_total",
            "self_cuda_memory_usage",
            "self_cuda_time_total",
        }
    )

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        emit_nvtx: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath, filename)
        if sort_by_key is None:
            sort_by_key = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
        if sort_by_key not in self.AVAILABLE_SORT_KEYS:
            raise ConfigError(
                f"PyTorchProfiler(sort_by_key={sort_by_key!r}): expected one of "
                f"{', '.join(sorted(self.AVAILABLE_SORT_KEYS))}."
            )
        self._sort_by_key = sort_by_key
        self._group_by_input_shapes = group_by_input_shapes
        self._emit_nvtx = emit_nvtx
        self._export_to_chrome = export_to_chrome
        self._row_limit = row_limit
        self._record_module_names = record_module_names
        self._table_kwargs = table_kwargs or {}
        self._profiler_kwargs = profiler_kwargs
        self.profiler: Any = None
        """torch's profiler, while a run is profiled."""
        self._ranges: dict[str, list[AbstractContextManager[Any]]] = {}
        self._events: Any = None
        self._hooks: list[Any] = []

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A run starts, and with it the recording."""
        super().setup(stage, local_rank, log_dir)
        self._events = None
        if self._emit_nvtx:
            if not torch.cuda.is_available():
                raise ConfigError(
                    "PyTorchProfiler(emit_nvtx=True) labels what a GPU does: torch sees none here."
                )
            self.profiler = torch.autograd.profiler.emit_nvtx()
        else:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            options = {
                "activities": activities,
                "record_shapes": self._group_by_input_shapes,
                **self._profiler_kwargs,
            }
            self.profiler = profile(**options)
        self.profiler.__enter__()
        if self._record_module_names:
            self._hooks = [
                register_module_forward_pre_hook(lambda module, _: self.start(_label(module))),
                register_module_forward_hook(lambda module, *_: self.stop(_label(module)), always_call=True),
            ]

    def start(self, action_name: str) -> None:
        """An action starts: a range in the trace."""
        if self.profiler is not None:
            labelled = record_function(action_name)
            labelled.__enter__()
            self._ranges.setdefault(action_name, []).append(labelled)

    def stop(self, action_name: str) -> None:
        """It stops; behind a step, a ``schedule=`` of torch's profiler goes on by one."""
        open_ranges = self._ranges.get(action_name)
        if not open_ranges:
            return
        open_ranges.pop().__exit__(None, None, None)
        if "schedule" in self._profiler_kwargs and action_name.endswith(_STEPS):
            self.profiler.step()

    def summary(self) -> str:
        """The table of operations."""
        self._finish()
        if self._events is None:
            return ""
        averages = self._events.key_averages(group_by_input_shape=self._group_by_input_shapes)
        rows = averages.table(
            sort_by=self._sort_by_key.replace("cuda", "device"),
            row_limit=self._row_limit,
            **self._table_kwargs,
        )
        return f"{self._heading()}Profiler Report\n{rows}"

    def teardown(self, stage: str | None) -> None:
        """A run is over: so is the recording."""
        self._finish()
        self._ranges.clear()

    def _finish(self) -> None:
        profiler, self.profiler = self.profiler, None
        while self._hooks:
            self._hooks.pop().remove()
        if profiler is None:
            return
        for ranges in self._ranges.values():
            while ranges:
                ranges.pop().__exit__(None, None, None)
        profiler.__exit__(None, None, None)
        if self._emit_nvtx:
            return
        if profiler.profiler is None:
            rank_zero_warn(
                "PyTorchProfiler recorded nothing: the run was over before its schedule= came to a step that "
                "is recorded."
            )
            return
        self._events = profiler
        if self._export_to_chrome and "on_trace_ready" not in self._profiler_kwargs:
            path = self._file(f"{'-' if self._stage or self.filename else ''}{os.getpid()}.pt.trace.json")
            profiler.export_chrome_trace(path)


def _label(module: torch.nn.Module) -> str:
    return f"[Module]{type(module).__name__}"
