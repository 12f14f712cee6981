"""What TensorBoard's own reader sees in a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2


def accumulated(directory: str | os.PathLike[str]) -> EventAccumulator:
    found = EventAccumulator(os.fspath(directory), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def series(directory: str | os.PathLike[str]) -> dict[str, list[tuple[int, float]]]:
    """Every curve below ``directory``, by its path and tag: (step, value) in the order they are shown."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for place in sorted({path.parent for path in Path(directory).rglob("*tfevents*")}):
        reader = accumulated(place)
        for tag in reader.Tags()["scalars"]:
            name = f"{place.relative_to(directory)}:{tag}".removeprefix(".:")
            curves[name] = [(event.step, event.value) for event in reader.Scalars(tag)]
    return curves


def table(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The run's row in the table of hyperparameters."""
    content = accumulated(directory).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}
