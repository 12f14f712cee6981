"""What is wrong is refused by name, with the fix, and nothing on disk is lost by asking."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import holdfast as pl
from holdfast import errors
from holdfast.callbacks import ModelCheckpoint


class Net(pl.LightningModule):
    def __init__(self, width: int = 4, names: tuple[str, str] = ("first", "second")) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Linear(3, width))
        self.add_module(names[1], nn.Linear(width, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        return second(first(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(root: Path, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        **{"accelerator": "cpu", "default_root_dir": root, "max_epochs": 2, **quiet, **arguments}
    )


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(24.0).view(8, 3) / 24), batch_size=4)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The root of a finished run with two checkpoints: epoch=0-step=2.ckpt and epoch=1-step=4.ckpt."""
    trainer = make_trainer(tmp_path / "run", callbacks=ModelCheckpoint(save_top_k=-1))
    trainer.fit(Net(), loader())
    return tmp_path / "run"


@pytest.fixture
def newest(run: Path) -> Path:
    path = run / "checkpoints" / "epoch=1-step=4.ckpt"
    assert path.exists()
    return path


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def overwrite(path: Path, contents: bytes) -> None:
    """Write damaged contents under a name whose file may be read-only, shared with another name."""
    path.unlink()
    path.write_bytes(contents)


def refused(error: type[Exception], root: Path, ckpt_path: Any, module: Any = None, **arguments: Any) -> str:
    """The message with which fit refuses; the disk and the module's weights stay as they were."""
    module = Net() if module is None else module
    before = contents(root)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error) as caught:
        make_trainer(root, **arguments).fit(module, loader(), ckpt_path=ckpt_path)
    assert contents(root) == before
    assert all(value.equal(weights[name]) for name, value in module.state_dict().items())
    return str(caught.value)


class TestMissing:
    def test_names_the_nearest(self, run: Path) -> None:
        wanted = run / "checkpoints" / "epoch=1-step=5.ckpt"
        message = refused(errors.CheckpointNotFound, run, wanted)
        assert message == (
            f"There is no checkpoint {wanted}. The nearest names there: "
            "epoch=1-step=4.ckpt, epoch=0-step=2.ckpt."
        )

    def test_is_a_file_not_found_error(self, run: Path) -> None:
        refused(FileNotFoundError, run, "nowhere.ckpt")

    def test_directory_that_does_not_exist(self, run: Path) -> None:
        wanted = run / "checkpoint" / "epoch=1-step=4.ckpt"
        message = refused(errors.CheckpointNotFound, run, wanted)
        assert (
            message == f"There is no checkpoint {wanted}. There is no directory {run / 'checkpoint'} either."
        )

    @pytest.mark.parametrize("verb", ["validate", "test", "predict"])
    def test_evaluation_too(self, verb: str, run: Path) -> None:
        class Evaluated(Net):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                raise AssertionError("no batch is run without the weights that were asked for")

            test_step = predict_step = validation_step

        with pytest.raises(errors.CheckpointNotFound, match=re.escape("The nearest names there: epoch=")):
            getattr(make_trainer(run), verb)(
                Evaluated(), loader(), ckpt_path=run / "checkpoints" / "epoch=7.ckpt"
            )

    def test_load_from_checkpoint_too(self, run: Path) -> None:
        with pytest.raises(errors.CheckpointNotFound, match=re.escape("The nearest names there: epoch=")):
            Net.load_from_checkpoint(run / "checkpoints" / "epoch=7.ckpt")


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], type[Exception]]] = {
    "text": (lambda whole: b"epoch,step,loss\n1,2,0.5\n" * 50, errors.CheckpointIncomplete),
    "empty": (lambda whole: b"", errors.CheckpointIncomplete),
    "first half": (lambda whole: whole[: len(whole) // 2], errors.CheckpointIncomplete),
    "last byte missing": (lambda whole: whole[:-1], errors.CheckpointIncomplete),
    "zeros at the end": (lambda whole: whole[:-200] + bytes(200), errors.CheckpointIncomplete),
}


class TestDamaged:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_not_a_whole_checkpoint(self, damage: str, run: Path, newest: Path) -> None:
        change, error = DAMAGES[damage]
        overwrite(newest, change(newest.read_bytes()))
        message = refused(error, run, newest)
        assert newest.name in message

    def test_flipped_bit_names_the_tensor(self, run: Path, newest: Path) -> None:
        weights = torch.load(newest, weights_only=True)["state_dict"]["first.weight"]
        whole = newest.read_bytes()
        place = whole.index(weights.numpy().tobytes())
        damaged = bytearray(whole)
        damaged[place + 5] ^= 16
        overwrite(newest, bytes(damaged))
        message = refused(errors.CheckpointCorrupt, run, newest)
        assert message.startswith("epoch=1-step=4.ckpt is corrupt: ")
        assert "first.weight" in message
        assert "epoch=0-step=2.ckpt" in message, "the newest whole one is named"

    def test_flipped_bit_is_not_loaded_into_a_model(self, newest: Path) -> None:
        damaged = bytearray(newest.read_bytes())
        damaged[len(damaged) // 3] ^= 1
        overwrite(newest, bytes(damaged))
        with pytest.raises(errors.CheckpointError, match=re.escape(newest.name)):
            Net.load_from_checkpoint(newest)

    def test_a_directory(self, run: Path) -> None:
        message = refused(errors.CheckpointIncomplete, run, run / "checkpoints")
        assert message == f"{run / 'checkpoints'} is a directory, not a checkpoint file."

    def test_something_else_that_torch_saved(self, run: Path) -> None:
        torch.save([1, 2, 3], run / "list.ckpt")
        assert "list.ckpt" in refused(errors.CheckpointError, run, run / "list.ckpt")


class TestAuto:
    def test_falls_back_to_the_newest_that_is_verified(
        self, run: Path, newest: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        damaged = bytearray(newest.read_bytes())
        damaged[len(damaged) // 3] ^= 1
        overwrite(newest, bytes(damaged))
        trainer = make_trainer(run, max_epochs=1)
        trainer.fit(Net(), loader(), ckpt_path="auto")
        said = capsys.readouterr().err
        assert Path(trainer.resumed_from).name == "epoch=0-step=2.ckpt"
        assert "passed over" in said and "epoch=1-step=4.ckpt" in said and "is corrupt" in said

    def test_none_whole_is_not_a_fresh_start(self, run: Path) -> None:
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"]
        for name in names:
            path = run / "checkpoints" / name
            overwrite(path, path.read_bytes()[:-1])
        message = refused(errors.CheckpointIncomplete, run, "auto")
        first, *listed, last = message.splitlines()
        assert first == (
            'ckpt_path="auto": there are checkpoints, but not one is whole and verified, and starting from '
            "step 0 would bury them:"
        )
        assert sorted(os.path.basename(line.split(":")[0]) for line in listed) == names
        assert last == "Move them away, or give a path, or ckpt_path=None to start anew."

    def test_nothing_there_is_a_fresh_start_and_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trainer = make_trainer(tmp_path)
        trainer.fit(Net(), loader(), ckpt_path="auto")
        assert trainer.resumed_from is None and trainer.global_step == 4
        assert (
            'ckpt_path="auto": no checkpoint in checkpoints yet; starting from scratch'
            in capsys.readouterr().err
        )


class TestParametersThatDoNotFit:
    def test_every_missing_and_unexpected_one_is_listed(self, run: Path, newest: Path) -> None:
        message = refused(errors.CheckpointIncompatible, run, newest, Net(names=("first", "third")))
        assert message == (
            "epoch=1-step=4.ckpt does not fit Net. Keys 2 missing from the file:\n  third.weight\n  third.bias\n"
            "Keys 2 in the file that the model does not have:\n  second.weight\n  second.bias\n"
            "strict=False loads what matches."
        )

    def test_every_shape_is_given_twice(self, run: Path, newest: Path) -> None:
        message = refused(errors.CheckpointIncompatible, run, newest, Net(width=5))
        assert message == (
            "epoch=1-step=4.ckpt does not fit Net. Keys 3 of another shape:\n"
            "  first.weight: (4, 3) in the file, (5, 3) in the model\n"
            "  first.bias: (4,) in the file, (5,) in the model\n"
            "  second.weight: (1, 4) in the file, (1, 5) in the model\n"
            "Build the model with the arguments it was trained with; or remove these keys in on_load_checkpoint "
            "and load with strict=False."
        )

    def test_shapes_are_checked_even_with_strict_false(self, newest: Path) -> None:
        with pytest.raises(
            errors.CheckpointIncompatible, match=re.escape("first.bias: (4,) in the file, (5,)")
        ):
            Net.load_from_checkpoint(newest, width=5, strict=False)

    def test_not_one_key_is_an_error_even_with_strict_false(self, newest: Path) -> None:
        with pytest.raises(errors.CheckpointIncompatible) as caught:
            Net.load_from_checkpoint(newest, names=("a", "b"), strict=False)
        assert str(caught.value) == (
            "epoch=1-step=4.ckpt does not fit Net: not one of its 4 keys is the model's. The model has "
            "'a.weight', the file has 'first.weight'. Is it the right file, or is there a prefix to strip?"
        )

    def test_strict_false_loads_what_matches(self, newest: Path) -> None:
        saved = torch.load(newest, weights_only=True)["state_dict"]
        loaded = Net.load_from_checkpoint(newest, names=("first", "third"), strict=False)
        assert loaded.first.weight.equal(saved["first.weight"])

    def test_another_number_of_optimizers(self, run: Path, newest: Path) -> None:
        class Two(Net):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def configure_optimizers(self) -> Any:
                return [
                    torch.optim.SGD(self.first.parameters(), 0.1),
                    torch.optim.SGD(self.second.parameters(), 0.1),
                ]

        with pytest.raises(errors.CheckpointIncompatible) as caught:
            make_trainer(run).fit(Two(), loader(), ckpt_path=newest)
        assert str(caught.value) == (
            "epoch=1-step=4.ckpt holds the state of 1 optimizers, but configure_optimizers returned 2. Resume with the "
            "optimizers that the run was started with."
        )

    def test_weights_only(self, run: Path) -> None:
        trainer = make_trainer(run, max_epochs=1)
        trainer.fit(Net(), loader())
        trainer.save_checkpoint(run / "weights.ckpt", weights_only=True)
        message = refused_after_load(run, run / "weights.ckpt")
        assert message == (
            "weights.ckpt holds weights only; a run cannot go on from it. Load them with "
            "Net.load_from_checkpoint and start a new run."
        )


def refused_after_load(root: Path, path: Path) -> str:
    """The same as `refused`, for what is found when the weights are in the model already."""
    before = contents(root)
    with pytest.raises(errors.CheckpointIncompatible) as caught:
        make_trainer(root).fit(Net(), loader(), ckpt_path=path)
    assert contents(root) == before
    return str(caught.value)


class TestModule:
    def test_without_training_step(self, tmp_path: Path) -> None:
        class NoStep(pl.LightningModule):
            def configure_optimizers(self) -> None:
                return None

        message = refused(errors.ConfigError, tmp_path, None, NoStep())
        assert "NoStep" in message and "training_step" in message

    def test_without_configure_optimizers(self, tmp_path: Path) -> None:
        class NoOptimizer(pl.LightningModule):
            def training_step(self, batch: Any, batch_idx: int) -> None:
                return None

        message = refused(errors.ConfigError, tmp_path, None, NoOptimizer())
        assert "NoOptimizer" in message and "configure_optimizers" in message

    def test_without_data(self, tmp_path: Path) -> None:
        with pytest.raises(errors.ConfigError, match="train_dataloader"):
            make_trainer(tmp_path).fit(Net())

    def test_not_a_module(self, tmp_path: Path) -> None:
        with pytest.raises((errors.ConfigError, TypeError), match="LightningModule"):
            make_trainer(tmp_path).fit(nn.Linear(2, 2), loader())


class TestTrainerArguments:
    def test_nearest_name(self) -> None:
        with pytest.raises(errors.ConfigError) as caught:
            pl.Trainer(max_epoch=3)
        assert str(caught.value) == (
            "Trainer() got an unexpected keyword argument 'max_epoch'. Did you mean 'max_epochs'?"
        )

    def test_nothing_near(self) -> None:
        with pytest.raises(errors.ConfigError) as caught:
            pl.Trainer(zzz=3)
        assert str(caught.value).startswith("Trainer() got an unexpected keyword argument 'zzz'. It takes ")
        assert "max_epochs" in str(caught.value)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"limit_train_batches": 1.5},
            {"accumulate_grad_batches": 0},
            {"precision": "12"},
            {"val_check_interval": -1},
        ],
        ids=str,
    )
    def test_values(self, arguments: dict[str, Any]) -> None:
        ((name, value),) = arguments.items()
        with pytest.raises(errors.ConfigError, match=rf"{name}={re.escape(repr(value))}"):
            pl.Trainer(max_epochs=1, **arguments)
