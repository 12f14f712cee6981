"""The training that every contender of the step benchmark runs: same model, same rows, same loader."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

FEATURES = 32
CLASSES = 4
BATCH_SIZE = 8


class Stopwatch:
    """Reads both clocks when batch ``first`` and batch ``last`` of a run begin.

    Everything between two calls of a training step is inside: fetching, forward, backward, the optimizer,
    logging, callbacks. What happens once a run (set-up, first allocations, the save at the end) is outside.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    def tick(self, batch_idx: int) -> None:
        """Costs every other step two integer comparisons, the same for every contender."""
        if batch_idx == self.first or batch_idx == self.last:
            self.wall_s.append(perf_counter())
            self.cpu_s.append(process_time())

    def result(self) -> Timing:
        """Raises RuntimeError when the contender did not run both batches exactly once."""
        if len(self.wall_s) != 2:
            raise RuntimeError(
                f"batches {self.first} and {self.last} should be timed; saw {len(self.wall_s)}"
            )
        steps = self.last - self.first
        wall_us, cpu_us = (1e6 * (clock[1] - clock[0]) / steps for clock in (self.wall_s, self.cpu_s))
        return Timing(wall_us, cpu_us)


@dataclass(frozen=True)
class Timing:
    """Microseconds per step, by the wall and by the processor time of the whole process."""

    wall_us: float
    cpu_us: float


class JitteredRows(Dataset[tuple[Tensor, Tensor]]):
    """A user's own dataset: it draws from torch, NumPy and ``random`` for each row."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs = inputs
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.inputs[index] + 0.01 * torch.randn(FEATURES)
        if random.random() < 0.5:
            row = row * float(numpy.random.uniform(0.9, 1.1))
        return row, self.labels[index]


@dataclass
class Workload:
    """How large the run is; hands out fresh models, loaders and a stopwatch."""

    warmup_steps: int = 300
    timed_steps: int = 1500
    hidden: int = 32
    optimizer: str = "sgd"
    stopwatch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> Stopwatch:
        """A new stopwatch for the next contender."""
        self.stopwatch = Stopwatch(self.warmup_steps, self.warmup_steps + self.timed_steps)
        return self.stopwatch

    @property
    def batches(self) -> int:
        return self.warmup_steps + self.timed_steps + 1

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, self.hidden), nn.ReLU(), nn.Linear(self.hidden, CLASSES))

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[self.optimizer]
        return kind(parameters, lr=1e-3)

    def loader(self, *, own_dataset: bool = False) -> DataLoader[Any]:
        rows = self.batches * BATCH_SIZE
        inputs, labels = torch.randn(rows, FEATURES), torch.randint(0, CLASSES, (rows,))
        dataset: Dataset[Any] = JitteredRows(inputs, labels) if own_dataset else TensorDataset(inputs, labels)
        return DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True)
