"""The training that every contender of the step benchmark runs: same model, same rows, same loader."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

FEATURES = 32
CLASSES = 4
BATCH_SIZE = 8


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


@dataclass(frozen=True)
class Workload:
    """How large a run is; hands out fresh models and loaders."""

    batches: int
    hidden: int = 32
    optimizer: str = "sgd"

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
