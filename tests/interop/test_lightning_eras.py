"""Older files: what Lightning itself makes of them, and we beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import omegaconf
import pytest
import torch

import holdfast
from tests.checkpoint.era_files import EPOCHS, ERAS, STEPS, importable, model_class, write

from .regression import make_trainer

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

NAMED_IN_FILES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


def go_on(pl: Any, path: Path, root: Path, **options: Any) -> tuple[Any, list[tuple[int, int]]]:
    """Resume in the package; the module and (epoch, global step) at each of its batches."""
    seen: list[tuple[int, int]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            seen.append((trainer.current_epoch, trainer.global_step))

    module = model_class(pl)()
    trainer = make_trainer(pl, root, max_epochs=4, callbacks=[Look()], enable_checkpointing=False)
    trainer.fit(module, ckpt_path=path, **options)
    return module, seen


@pytest.mark.parametrize("era", [era for era in ERAS if era >= "1.6"])
def test_a_run_goes_on_where_lightning_goes_on(era: str, tmp_path: Path) -> None:
    path = write(era, tmp_path / "a.ckpt")
    mine, our_places = go_on(holdfast, path, tmp_path / "ours")
    theirs, their_places = go_on(lightning, path, tmp_path / "theirs")
    assert our_places == their_places
    assert our_places[0] == (EPOCHS, STEPS)
    assert all(torch.equal(mine.state_dict()[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("era", ["0.8.5", "0.9.1", "1.1.8", "1.5.10"])
def test_before_1_6_lightning_knows_the_step_and_trains_all_epochs_again(era: str, tmp_path: Path) -> None:
    path = write(era, tmp_path / "a.ckpt")
    _, our_places = go_on(holdfast, path, tmp_path / "ours")
    with importable(*NAMED_IN_FILES):
        _, their_places = go_on(lightning, path, tmp_path / "theirs", weights_only=False)
    assert their_places[0] == (0, STEPS)
    assert our_places == [(EPOCHS + i // 3, STEPS + i) for i in range(STEPS)]


def test_a_file_without_a_version_which_lightning_cannot_load(tmp_path: Path) -> None:
    payload = torch.load(write("2.6.0", tmp_path / "a.ckpt"), weights_only=True)
    del payload["pytorch-lightning_version"]
    torch.save(payload, tmp_path / "a.ckpt")
    with pytest.raises(KeyError, match="pytorch-lightning_version"):
        model_class(lightning).load_from_checkpoint(tmp_path / "a.ckpt")
    loaded = model_class(holdfast).load_from_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in payload["state_dict"].items())


def test_omegaconf_in_lightnings_files(tmp_path: Path) -> None:
    """Lightning saves its containers, and by default refuses to load them again."""

    def module(pl: Any) -> type:
        class Configured(model_class(pl)):  # type: ignore[misc]
            def __init__(self, conf: Any) -> None:
                pl.LightningModule.__init__(self)
                self.save_hyperparameters(conf)
                self.layer = torch.nn.Linear(3, conf.width)

        return Configured

    conf = omegaconf.OmegaConf.create({"lr": 0.1, "width": 1, "more": {"lr": "${lr}", "list": [1, None]}})
    trainer = make_trainer(lightning, tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module(lightning)(conf))
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        module(lightning).load_from_checkpoint(tmp_path / "theirs.ckpt")
    loaded = module(holdfast).load_from_checkpoint(tmp_path / "theirs.ckpt")
    assert isinstance(loaded.hparams, omegaconf.DictConfig)
    assert loaded.hparams == conf
    assert loaded.hparams.more.lr == 0.1
