"""The page "Saving and loading weights": `load_from_checkpoint` from anywhere, with any overrides."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast import Trainer

from .models import LitAutoEncoder, LitModel, quiet

PATH = "path/to/checkpoint.ckpt"


@pytest.fixture
def saved() -> LitModel:
    """A model that is saved under PATH."""
    model = LitModel(in_dim=32, out_dim=10)
    trainer = Trainer(**quiet(logger=False, enable_checkpointing=False, max_epochs=1))
    trainer.fit(model)
    trainer.save_checkpoint(PATH)
    return model


@pytest.fixture
def address() -> Iterator[str]:
    """Where the working directory is served over HTTP."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(Path.cwd())))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_path(saved: LitModel) -> None:
    model = LitModel.load_from_checkpoint(PATH)
    assert same(model, saved)
    assert model.learning_rate == saved.learning_rate
    assert same(LitModel.load_from_checkpoint(checkpoint_path=Path(PATH)), saved)
    model.eval()
    model.freeze()
    x = torch.rand(4, 1)
    assert torch.equal(model(x), saved(x))


def test_a_url(saved: LitModel, address: str) -> None:
    assert same(LitModel.load_from_checkpoint(f"{address}/{PATH}"), saved)


def test_a_file_object(saved: LitModel) -> None:
    with open(PATH, "rb") as file:
        assert same(LitModel.load_from_checkpoint(file), saved)
    assert same(LitModel.load_from_checkpoint(io.BytesIO(Path(PATH).read_bytes())), saved)


@pytest.mark.parametrize(
    "map_location",
    [None, "cpu", torch.device("cpu"), {"cuda:1": "cuda:0"}, lambda storage, location: storage],
    ids=["None", "str", "device", "dict", "callable"],
)
def test_map_location(saved: LitModel, map_location: Any) -> None:
    model = LitModel.load_from_checkpoint(PATH, map_location=map_location)
    assert same(model, saved)
    assert model.device == torch.device("cpu")


def test_a_hierarchical_hparams_file(saved: LitModel) -> None:
    class Configured(LitAutoEncoder):
        def __init__(self, drop_prob: float, dataloader: dict[str, int]) -> None:
            super().__init__()
            self.drop_prob, self.batch_size = drop_prob, dataloader["batch_size"]

    Path("hparams_file.yaml").write_text("drop_prob: 0.2\ndataloader:\n    batch_size: 32\n")
    model = Configured.load_from_checkpoint(PATH, hparams_file="hparams_file.yaml", strict=False)
    assert (model.drop_prob, model.batch_size) == (0.2, 32)
    assert torch.equal(model.backbone.weight, saved.backbone.weight)


def test_an_hparams_file_with_comma_separated_values(saved: LitModel) -> None:
    """Lightning's second form: a header, then a line for each hyperparameter."""
    Path("hparams.csv").write_text("key,value\nin_dim,32\nout_dim,10\n")
    assert same(LitModel.load_from_checkpoint(PATH, hparams_file="hparams.csv"), saved)


def test_strict(saved: LitModel) -> None:
    class Wider(LitModel):
        def __init__(self, in_dim: int, out_dim: int) -> None:
            super().__init__(in_dim, out_dim)
            self.l2 = torch.nn.Linear(1, 1)

    with pytest.raises(pl.CheckpointIncompatible) as refused:
        Wider.load_from_checkpoint(PATH)
    assert str(refused.value) == (
        "checkpoint.ckpt does not fit Wider. Keys 2 missing from the file:\n  l2.weight\n  l2.bias\n"
        "strict=False loads what matches."
    )
    assert torch.equal(Wider.load_from_checkpoint(PATH, strict=False).l1.weight, saved.l1.weight)


def test_saved_values(saved: LitModel) -> None:
    # if you train and save the model like this it will use these values when loading
    model = LitModel.load_from_checkpoint(PATH)
    assert (model.l1.in_features, model.l1.out_features) == (32, 10)


def test_overridden_values(saved: LitModel) -> None:
    # but they can be overridden: uses in_dim=128, out_dim=10
    class LitModelWithoutWeights(LitModel):
        """Leaves the layer of another size out of what is loaded, as one must to load it at all."""

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {
                key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("l1")
            }

    model = LitModelWithoutWeights.load_from_checkpoint(PATH, in_dim=128, out_dim=10, strict=False)
    assert (model.l1.in_features, model.l1.out_features) == (128, 10)
    assert dict(model.hparams) == {"in_dim": 128, "out_dim": 10}


def test_overridden_values_that_do_not_fit_the_saved_weights(saved: LitModel) -> None:
    with pytest.raises(pl.CheckpointIncompatible) as refused:
        LitModel.load_from_checkpoint(PATH, in_dim=128, out_dim=10)
    assert str(refused.value).startswith(
        "checkpoint.ckpt does not fit LitModel. Keys 1 of another shape:\n"
        "  l1.weight: (10, 32) in the file, (10, 128) in the model"
    )


def test_the_class_loads_and_an_instance_does_not(saved: LitModel) -> None:
    with pytest.raises(TypeError, match="load_from_checkpoint"):
        saved.load_from_checkpoint(PATH)
