"""Checkpoints whose values are of other types than training expects: refused by name, with nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.checkpoint.engine import CheckpointEngine
from holdfast.checkpoint.load import load
from holdfast.errors import CheckpointIncompatible


class Model(holdfast.LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def trainer(place: Path, steps: int) -> holdfast.Trainer:
    return holdfast.Trainer(
        default_root_dir=place, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def data() -> Any:
    return torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("run")
    made = trainer(place, 3)
    made.fit(Model(), data())
    made.save_checkpoint(place / "a.ckpt")
    read: dict[str, Any] = load(place / "a.ckpt")
    return read


def changed(value: Any, path: tuple[str, ...], wrong: Any) -> Any:
    """A copy of a payload with another value in one place."""
    return wrong if not path else {**value, path[0]: changed(value[path[0]], path[1:], wrong)}


WHERE = [
    ("state_dict", "a dict"), ("optimizer_states", "a list of dicts"), ("lr_schedulers", "a list of dicts"),
    ("callbacks", "a dict"), ("holdfast/progress", "a dict"), ("holdfast/data", "a dict"),
    ("holdfast/data/now", "a dict"), ("holdfast/generators", "a list of dicts"), ("holdfast/metrics", "a dict"),
    ("holdfast/metrics/logged", "a dict"), ("holdfast/metrics/train", "a list of dicts"),
    ("holdfast/param_groups", "a list"), ("holdfast/command", "a dict"),
    ("holdfast/command/optimizers", "a list of dicts"), ("holdfast/environment", "a dict"),
    ("holdfast/progress/global_step", "a whole number"), ("holdfast/progress/epoch", "a whole number"),
]  # fmt: skip
WRONG = [(5.5, "float"), ("os.system", "str"), (True, "bool"), ([[1]], "list of list")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where, expected", WHERE)
def test_a_part_of_another_type_is_refused_by_name(
    where: str, expected: str, payload: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a.ckpt"
    for wrong, found in WRONG:
        if expected == "a list" and isinstance(wrong, list):
            continue
        CheckpointEngine().save(changed(payload, tuple(where.split("/")), wrong), path)
        before = Model()
        for name, act in (
            ("load_from_checkpoint", lambda: Model.load_from_checkpoint(path)),
            ("fit", lambda before=before: trainer(tmp_path, 4).fit(before, data(), ckpt_path=str(path))),
        ):
            if name != "fit" and where == "optimizer_states":
                continue  # it never looks at them
            weight = before.layer.weight.clone()
            with pytest.raises(CheckpointIncompatible) as caught:
                act()
            assert str(caught.value).endswith(f"a.ckpt: {where} should be {expected}, found {found}."), name
            assert caught.value.path == str(path)
            assert torch.equal(before.layer.weight, weight)
