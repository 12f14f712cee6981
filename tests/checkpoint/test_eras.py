"""Files of every era of PyTorch Lightning: loaded, and gone on from as if the run had never stopped."""

from __future__ import annotations

import copy
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from era_files import (
    BATCHES,
    BEST,
    EPOCHS,
    ERAS,
    LR,
    MONITORS,
    SCALER,
    STEPS,
    STOPPING,
    model_class,
    trained,
    write,
)

import holdfast as pl
from holdfast.callbacks import EarlyStopping, ModelCheckpoint
from holdfast.checkpoint import eras
from holdfast.checkpoint.load import load
from holdfast.checkpoint.migrate import upgrade

# What else it says of such a file is that it is not exact: see tests/resume/test_declared.py.
pytestmark = pytest.mark.filterwarnings("ignore:Once resumed, this run is not bit for bit:UserWarning")


class Start(pl.Callback):
    """Remembers where training began and what had been restored by then."""

    place: tuple[int, int, int] | None = None
    restored: dict[str, Any]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.place is None:
            self.place = (trainer.current_epoch, batch_idx, trainer.global_step)
            states = {type(c).__name__: copy.deepcopy(c.state_dict()) for c in trainer.callbacks}
            scaler = trainer.precision_plugin.scaler
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            self.restored = {"lr": lr, "scaler": scaler and scaler.state_dict(), **states}


def fit(
    model: Any, root: Path, callbacks: list[Any] | None = None, *, path: Path | None = None, **more: Any
) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2 * EPOCHS,
        callbacks=callbacks or [],
        default_root_dir=root,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks or []),
        **quiet,
        **more,
    )
    trainer.fit(model, ckpt_path=path)


def make(era: str) -> Any:
    whole = era == "0.7.6"
    return model_class(pl, whole=whole)(*([Namespace(lr=LR, width=1)] if whole else []))


@pytest.mark.parametrize("era", ERAS)
def test_the_model_is_loaded_with_its_hyperparameters(era: str, tmp_path: Path) -> None:
    path = write(era, tmp_path / "a.ckpt")
    loaded = model_class(pl, whole=era == "0.7.6").load_from_checkpoint(path)
    weights = trained()["state_dict"]
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {
        name: value.tolist() for name, value in weights.items()
    }
    assert loaded.hparams == ({"lr": LR, "width": 1} if era == "0.7.6" else {"lr": LR})


@pytest.mark.filterwarnings(
    "ignore:The checkpoint holds the state of callbacks that this trainer does not have"
)
@pytest.mark.filterwarnings("ignore:The checkpoint's loss scaling is apex's")
@pytest.mark.parametrize("era", ERAS)
def test_a_run_goes_on_from_it_as_if_it_had_never_stopped(era: str, tmp_path: Path) -> None:
    whole, resumed, start = make(era), make(era), Start()
    fit(whole, tmp_path)
    fit(resumed, tmp_path, [start], path=write(era, tmp_path / "a.ckpt"))
    assert start.place == (EPOCHS, 0, STEPS)
    assert start.restored["lr"] == LR * 0.5**EPOCHS
    assert resumed.global_step == whole.global_step == 2 * STEPS
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:The checkpoint's loss scaling is apex's")
@pytest.mark.parametrize("era", [era for era in ERAS if era >= "1"])
def test_callbacks_and_the_scaler_go_on_from_it(era: str, tmp_path: Path) -> None:
    write(era, tmp_path / "a.ckpt")
    write(era, tmp_path / "best.ckpt")  # what is not there cannot be the best
    start = Start()
    callbacks = [ModelCheckpoint(dirpath=tmp_path, monitor="loss"), EarlyStopping("loss", patience=3), start]
    fit(make(era), tmp_path, callbacks, path=tmp_path / "a.ckpt", precision="16-mixed")
    stopping = start.restored["EarlyStopping"]
    assert {key: stopping[key] for key in STOPPING} == STOPPING
    assert start.restored["ModelCheckpoint"]["best_model_score"] == BEST["best_model_score"]
    assert Path(start.restored["ModelCheckpoint"]["best_model_path"]).name == BEST["best_model_path"]
    assert start.restored["scaler"] == SCALER


@pytest.mark.parametrize("era", ["0.8.5", "0.9.1"])
def test_the_best_model_of_0_10_and_earlier(era: str, tmp_path: Path) -> None:
    payload = upgrade(load(write(era, tmp_path / "a.ckpt")), source="a.ckpt")
    ranked = {BEST["best_model_path"]: BEST["best_model_score"]}
    assert payload["callbacks"] == {"ModelCheckpoint": {**BEST, "best_k_models": ranked}}
    assert not [key for key in payload if key.startswith("checkpoint_callback")]


def test_early_stopping_of_0_10_and_earlier() -> None:
    payload = {"state_dict": {}, "early_stop_callback_wait": 2, "early_stop_callback_patience": 3}
    upgraded = upgrade(payload, source="a.ckpt")
    assert upgraded["callbacks"] == {"EarlyStopping": {"wait_count": 2, "patience": 3}}
    assert "early_stop_callback_wait" in payload


def test_the_state_of_a_callback_by_its_class_goes_to_no_other_of_that_class(tmp_path: Path) -> None:
    class Counter(pl.Callback):
        def __init__(self, name: str = "") -> None:
            self.name, self.count = name, 0

        @property
        def state_key(self) -> str:
            return self.name or super().state_key

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.count = state_dict["count"]

    path = write("2.6.0", tmp_path / "a.ckpt")
    payload = torch.load(path)
    payload["callbacks"] = {Counter().state_key: {"count": 3}}
    torch.save(payload, path)
    by_name, plain = Counter("other"), Counter()
    fit(make("2.6.0"), tmp_path, [by_name, plain], path=path)
    assert (by_name.count, plain.count) == (0, 3)


def test_two_model_checkpoints_that_differed_in_what_1_9_dropped_stay_apart() -> None:
    key = f"ModelCheckpoint{{{MONITORS}, 'save_on_train_epoch_end': %s}}"
    states = {key % True: {"best_model_path": "a"}, key % False: {"best_model_path": "b"}, "Mine": {"x": 1}}
    assert upgrade({"state_dict": {}, "callbacks": states}, source="a.ckpt")["callbacks"] == states
    del states[key % False]
    assert list(upgrade({"state_dict": {}, "callbacks": states}, source="a.ckpt")["callbacks"]) == [
        f"ModelCheckpoint{{{MONITORS}}}",
        "Mine",
    ]


def test_the_scaling_of_apex_is_left_out_and_said() -> None:
    payload = {"state_dict": {}, "optimizer_states": [], "amp_scaling_state": {"loss_scaler0": {}}}
    message = (
        "The checkpoint's loss scaling is apex's, which is no more: it is left out, and a scaler starts anew."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        upgraded = upgrade(payload, source="a.ckpt")
    assert "amp_scaling_state" not in upgraded


def test_hyperparameters_under_all_their_old_names_at_once() -> None:
    payload = {"state_dict": {}, "hparams": {"a": 1, "b": 1}, "module_arguments": {"b": 2, "c": 2}}
    upgraded = upgrade(payload, source="a.ckpt")
    assert (upgraded["hyper_parameters"], upgraded["hparams_name"]) == ({"a": 1, "b": 2, "c": 2}, "kwargs")
    upgraded = upgrade({**payload, "hyper_parameters": {"c": 3}}, source="a.ckpt")
    assert upgraded["hyper_parameters"] == {"a": 1, "b": 2, "c": 3}


def test_the_step_of_the_loggers_axis_before_1_6_5(tmp_path: Path) -> None:
    progress = upgrade(load(write("1.6.0", tmp_path / "a.ckpt")), source="a.ckpt")["holdfast"]["progress"]
    assert (progress["batches_that_stepped"], progress["total_batches"]) == (STEPS, STEPS)
    assert (progress["epoch"], progress["batch"], progress["stage"]) == (EPOCHS - 1, BATCHES, "end")


@pytest.mark.parametrize("era", ERAS)
def test_a_file_that_was_brought_to_todays_shape_stays_as_it_is(era: str, tmp_path: Path) -> None:
    payload = load(write(era, tmp_path / "a.ckpt"))
    payload.pop("amp_scaling_state", None)
    for change in eras.CHANGES:
        if change.applies(payload):
            change.make(payload)
    assert [change.version for change in eras.CHANGES if change.applies(payload)] == []
