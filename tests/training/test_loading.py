"""`load_from_checkpoint`: with saved, overridden and separate hyperparameters, of every form."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import holdfast as pl
from tests.training.lit_model import LitModel, same, saved
from tests.training.toys import Toy, rows, trainer


@pytest.fixture
def lit(tmp_path: Path) -> Path:
    return saved(LitModel(3, 2), tmp_path / "lit.ckpt")


# -- saved and overridden hyperparameters --------------------------------------------------------------------


def test_the_saved_hyperparameters_build_the_model(lit: Path) -> None:
    loaded = LitModel.load_from_checkpoint(lit)
    assert loaded.hparams == {"in_dim": 3, "out_dim": 2}
    assert same(loaded, lit)


def test_overridden_hyperparameters_win(lit: Path) -> None:
    class Free(LitModel):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {}

    loaded = Free.load_from_checkpoint(lit, in_dim=128, out_dim=10, strict=False)
    assert loaded.hparams == {"in_dim": 128, "out_dim": 10}
    assert loaded.l1.weight.shape == (10, 128)


def test_weights_of_another_shape_are_listed_with_what_to_do(lit: Path) -> None:
    for strict in (True, False):
        with pytest.raises(pl.CheckpointIncompatible) as refused:
            LitModel.load_from_checkpoint(lit, in_dim=128, out_dim=10, strict=strict)
        assert str(refused.value) == (
            "lit.ckpt does not fit LitModel. Keys 2 of another shape:\n"
            "  l1.weight: (2, 3) in the file, (10, 128) in the model\n"
            "  l1.bias: (2,) in the file, (10,) in the model\n"
            "Build the model with the arguments it was trained with; or remove these keys in on_load_checkpoint and "
            "load with strict=False."
        )


def test_arguments_that_init_does_not_take_are_dropped_unless_it_takes_any(lit: Path) -> None:
    class Narrow(LitModel):
        def __init__(self, in_dim: int) -> None:
            super().__init__(in_dim, 2)

    class Wide(LitModel):
        def __init__(self, in_dim: int, **rest: Any) -> None:
            self.rest = rest
            super().__init__(in_dim, 2)

    assert Narrow.load_from_checkpoint(lit, extra=1).hparams == {"in_dim": 3, "out_dim": 2}
    assert Wide.load_from_checkpoint(lit, extra=1).rest == {"out_dim": 2, "extra": 1}


def test_an_override_that_is_nearly_an_argument_is_said(lit: Path) -> None:
    with pytest.warns(
        UserWarning,
        match=r"^LitModel.load_from_checkpoint\(in_dims=...\): __init__ takes no 'in_dims', so it is left out. "
        r"Did you mean 'in_dim'\?$",
    ):
        LitModel.load_from_checkpoint(lit, in_dims=4)


def test_positional_only_and_keyword_only_arguments(tmp_path: Path) -> None:
    class Odd(Toy):
        def __init__(self, width: int, /, lr: float = 0.5, *, scale: int) -> None:
            super().__init__(lr, width)
            self.save_hyperparameters()

    loaded = Odd.load_from_checkpoint(saved(Odd(2, scale=3), tmp_path / "a.ckpt"))
    assert loaded.hparams == {"width": 2, "lr": 0.5, "scale": 3}


class Whole(Toy):
    """Takes one object, under any name that its subclasses like."""

    def __init__(self, hparams: Any, note: str = "") -> None:
        pl.LightningModule.__init__(self)
        self.given = hparams
        self.save_hyperparameters(hparams)
        self.note = note
        self.layer = nn.Linear(3, self.hparams.width)
        self.seen = []


def test_a_model_that_takes_a_namespace_gets_one(tmp_path: Path) -> None:
    path = saved(Whole(Namespace(lr=0.1, width=2)), tmp_path / "a.ckpt")
    loaded = Whole.load_from_checkpoint(path)
    assert loaded.given == Namespace(lr=0.1, width=2)
    assert loaded.hparams == {"lr": 0.1, "width": 2}
    assert same(loaded, path)
    changed = Whole.load_from_checkpoint(path, lr=0.5, note="n")
    assert (changed.hparams, changed.note) == ({"lr": 0.5, "width": 2, "note": "n"}, "n")
    assert Whole.load_from_checkpoint(path, hparams={"width": 2, "lr": 3}).given == {"width": 2, "lr": 3}


def test_a_dict_comes_back_with_attributes(tmp_path: Path) -> None:
    loaded = Whole.load_from_checkpoint(saved(Whole({"lr": 0.1, "width": 2}), tmp_path / "a.ckpt"))
    assert loaded.given == {"lr": 0.1, "width": 2} and loaded.given.width == 2


def test_hyperparameters_filled_by_hand_fit_the_one_argument(tmp_path: Path) -> None:
    class ByHand(Whole):
        def __init__(self, hparams: Any) -> None:
            pl.LightningModule.__init__(self)
            self.hparams.update(hparams)
            self.layer = nn.Linear(3, hparams["width"])
            self.seen = []

    path = saved(ByHand({"lr": 0.1, "width": 2}), tmp_path / "a.ckpt")
    assert ByHand.load_from_checkpoint(path).hparams == {"lr": 0.1, "width": 2}
    assert ByHand.load_from_checkpoint(path, lr=3).hparams == {"lr": 3, "width": 2}


# -- files of hyperparameters --------------------------------------------------------------------------------


class Settings(Toy):
    def __init__(self, width: int, more: Any = None, where: Any = None, **rest: Any) -> None:
        pl.LightningModule.__init__(self)
        self.save_hyperparameters()
        self.layer = nn.Linear(3, width)
        self.seen = []


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return saved(Settings(2, more={"a": 1}, lr=0.1), tmp_path / "a.ckpt")


def test_a_hierarchical_yaml_file_replaces_the_saved_ones(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text(
        "width: 2\nmore:\n  data: {size: [1, 2]}\n  pair: !!python/tuple [1, 2]\n"
        "where: !!python/object/apply:pathlib.PosixPath [a, b]\n"
    )
    loaded = Settings.load_from_checkpoint(settings, hparams_file=tmp_path / "h.yaml")
    more = {"data": {"size": [1, 2]}, "pair": (1, 2)}
    assert loaded.hparams == {"width": 2, "more": more, "where": Path("a/b")}


def test_a_csv_file_replaces_the_saved_ones(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("key,value\nwidth,2\nmore,\"{'a': [1, 2.5]}\"\nname,resnet\nnone,None\n")
    loaded = Settings.load_from_checkpoint(settings, hparams_file=str(tmp_path / "h.csv"), on=True)
    assert loaded.hparams == {
        "width": 2,
        "more": {"a": [1, 2.5]},
        "where": None,
        "name": "resnet",
        "none": None,
        "on": True,
    }


def test_what_a_logger_wrote_is_such_a_file(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    run = trainer(logger=logger)
    run.fit(Settings(2, more={"a": [1, {"b": None}]}, lr=0.1), rows())
    run.save_checkpoint(tmp_path / "a.ckpt")
    found = Path(logger.log_dir) / "hparams.yaml"
    assert Settings.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=found).hparams == {
        "width": 2,
        "more": {"a": [1, {"b": None}]},
        "where": None,
        "lr": 0.1,
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h.txt", "a", "hparams_file='h.txt': expected a .yaml, .yml or .csv file."),
        ("h.yaml", None, "hparams_file='h.yaml' cannot be read: No such file or directory."),
        ("h.yaml", "[1]", "hparams_file='h.yaml' holds a list, expected names and values."),
        (
            "h.yaml",
            "a: !!python/object/apply:os.system ['true']",
            "hparams_file='h.yaml' cannot be read: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system' in \"h.yaml\", line 1, column 4",
        ),
        (
            "h.csv",
            "a,b\n1,2\n",
            "hparams_file='h.csv' cannot be read: its columns are ['a', 'b'], expected 'key' and 'value'.",
        ),
    ],
)
def test_files_that_are_none(settings: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(pl.ConfigError) as refused:
        Settings.load_from_checkpoint(settings, hparams_file=name)
    assert str(refused.value) == message


# -- datamodules ---------------------------------------------------------------------------------------------


class Rows(pl.LightningDataModule):
    def __init__(self, size: int = 4, conf: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.position = 0

    def train_dataloader(self) -> Any:
        return rows(batch_size=self.hparams.size)

    def state_dict(self) -> dict[str, Any]:
        return {"position": 7}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


def test_a_datamodule_comes_back_with_its_state(tmp_path: Path) -> None:
    run = trainer()
    run.fit(Toy(), datamodule=Rows(2, conf=Namespace(a=1)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    body = (tmp_path / "a.ckpt").read_bytes()
    for source in (tmp_path / "a.ckpt", (tmp_path / "a.ckpt").as_uri(), io.BytesIO(body)):
        loaded = Rows.load_from_checkpoint(source)
        assert (loaded.hparams, loaded.position) == ({"size": 2, "conf": Namespace(a=1)}, 7)
    (tmp_path / "h.yaml").write_text("size: 3\n")
    loaded = Rows.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file="h.yaml", conf="x")
    assert loaded.hparams == {"size": 3, "conf": "x"}
