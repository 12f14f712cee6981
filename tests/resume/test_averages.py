"""Averaged weights and those that train are both in the file; a resume and `load_from_checkpoint` take theirs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdfast as pl
from holdfast.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from holdfast.checkpoint.load import load
from holdfast.errors import CheckpointIncompatible, ConfigError

from .places import FEATURES, ByHand, Small, assert_resumes_everywhere, fit, rows

WEIGHT = "net.0.weight"


class Normed(Small):
    """With a BatchNorm, whose statistics the averages treat differently."""

    def make_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 1))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


class Watch(pl.Callback):
    """Copies of the weights that train, after each step, and before the first batch."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.first: Tensor | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if self.first is None:
            self.first = pl_module.net[0].weight.detach().clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.trained.append(pl_module.net[0].weight.detach().clone())


def run(root: Path, make: Callable[[], Any], **arguments: Any) -> tuple[Watch, pl.Trainer, list[Path]]:
    watch = Watch()
    _, trainer, saver = fit(root, Normed, lambda: [watch, make()], save=True, **arguments)
    return watch, trainer, saver.files


def weight(path: Path, which: Any = None) -> Tensor:
    return Normed.load_from_checkpoint(path, which_weights=which).net[0].weight.detach()


def batch(number: int, files: list[Path]) -> Path:
    return next(path for path in files if path.stem == f"batch-{number}")


AVERAGES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "mean": (WeightAveraging, {}),
    "mean, without buffers": (lambda: WeightAveraging(use_buffers=False), {}),
    "exponential": (lambda: EMAWeightAveraging(decay=0.7), {"val_check_interval": 2}),
    "exponential, of some steps": (lambda: EMAWeightAveraging(decay=0.7, update_every_n_steps=3), {}),
    "exponential, in windows": (lambda: EMAWeightAveraging(decay=0.7), {"accumulate_grad_batches": 3}),
    "exponential, in bfloat16": (lambda: EMAWeightAveraging(decay=0.7), {"precision": "bf16-true"}),
    "stochastic": (lambda: StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=2), {}),
    "stochastic, in windows": (
        lambda: StochasticWeightAveraging(0.02, swa_epoch_start=1, annealing_epochs=1),
        {"accumulate_grad_batches": 3},
    ),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_resumes(name: str, tmp_path: Path) -> None:
    make, arguments = AVERAGES[name]
    assert_resumes_everywhere(
        tmp_path, Normed, lambda: [make()], val=rows(9, shuffle=False), choose=lambda files: files[::2],
        max_epochs=3, **arguments,
    )  # fmt: skip


def test_resumes_where_optimization_is_by_hand(tmp_path: Path) -> None:
    class Hand(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.remember(loss)
            optimizer = self.optimizers()
            self.manual_backward(loss)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    assert_resumes_everywhere(tmp_path, Hand, lambda: [EMAWeightAveraging(decay=0.7)])


class Centred(Normed):
    """With buffers that are not persistent: one that training changes, and a large one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(1), persistent=False)
        self.register_buffer("mask", torch.ones(70_000), persistent=False)

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss((batch[0], batch[1] + self.center * self.mask[0]))
        if self.training:
            self.center.lerp_(loss.detach(), 0.3)
        return loss


@pytest.mark.parametrize("use_buffers", [True, False])
def test_buffers_that_no_state_dict_holds_are_averaged_too(use_buffers: bool, tmp_path: Path) -> None:
    _, files = assert_resumes_everywhere(
        tmp_path, Centred, lambda: [EMAWeightAveraging(decay=0.7, use_buffers=use_buffers)],
        val=rows(9, shuffle=False), val_check_interval=2,
    )  # fmt: skip
    own = load(files[-1])["holdfast"]
    assert list(own["model"]["buffers"]) == list(own["averaged_buffers"]) == ["center"]


def test_from_a_file_saved_after_training_a_longer_run_has_its_own_buffers(tmp_path: Path) -> None:
    def averages() -> list[Any]:
        return [EMAWeightAveraging(decay=0.7)]

    longer, _, _ = fit(tmp_path / "longer", Centred, averages, max_epochs=3)
    _, trainer, _ = fit(tmp_path / "short", Centred, averages)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    on, _, _ = fit(tmp_path / "on", Centred, averages, tmp_path / "end.ckpt", max_epochs=3)
    assert longer.losses[8:] == on.losses
    assert torch.equal(longer.center, on.center)


class TestSavedDuringValidation:
    """Validation has the average in the model: a file saved there, and what is resumed from it, has both."""

    def test_a_resume_and_its_sanity_check_leave_the_weights_that_train(self, tmp_path: Path) -> None:
        class SavesInside(pl.Callback):
            def on_validation_batch_end(self, trainer: Any, *rest: Any) -> None:
                if not trainer.sanity_checking and trainer.global_step == 2:
                    trainer.save_checkpoint(tmp_path / "inside.ckpt")
                    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

        watch = Watch()
        validated = {"val": rows(9, shuffle=False), "val_check_interval": 2, "num_sanity_val_steps": 2}
        fit(tmp_path, Normed, lambda: [EMAWeightAveraging(decay=0.7), watch, SavesInside()], **validated)
        raw = watch.trained[1]
        assert weight(tmp_path / "inside.ckpt", "raw").equal(raw)
        assert not weight(tmp_path / "inside.ckpt", "averaged").equal(raw)
        averaged = weight(tmp_path / "weights.ckpt", "averaged")
        assert averaged.equal(weight(tmp_path / "inside.ckpt", "averaged"))

        again = Watch()
        with pytest.warns(UserWarning, match="inside.ckpt was not taken at a safe point"):
            fit(
                tmp_path / "on", Normed, lambda: [EMAWeightAveraging(decay=0.7), again],
                tmp_path / "inside.ckpt", **validated,
            )  # fmt: skip
        assert again.first is not None
        assert again.first.equal(raw)

    def test_asked_for_in_validation_it_is_saved_after_it_and_exact(self, tmp_path: Path) -> None:
        """What a ModelCheckpoint saves on a validation's value waits until the weights are back."""
        best = pl.callbacks.ModelCheckpoint(
            tmp_path, filename="{step}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False
        )
        watch = Watch()
        fit(
            tmp_path, Normed, lambda: [EMAWeightAveraging(decay=0.7), watch, best],
            val=rows(9, shuffle=False), val_check_interval=2,
        )  # fmt: skip
        assert load(tmp_path / "step=2.ckpt")["holdfast"]["exact"]
        assert weight(tmp_path / "step=2.ckpt", "raw").equal(watch.trained[1])


class TestLoadingChooses:
    def test_with_weight_averaging(self, tmp_path: Path) -> None:
        watch, trainer, files = run(tmp_path, WeightAveraging)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        for path, step in ((batch(3, files), 3), (tmp_path / "end.ckpt", 8)):
            mean = torch.stack(watch.trained[:step]).mean(0)
            assert weight(path, "raw").equal(watch.trained[step - 1])
            assert torch.allclose(weight(path, "averaged"), mean)
            assert weight(path).equal(weight(path, "averaged")), (
                "state_dict is the average, as under Lightning"
            )

    def test_with_stochastic_weight_averaging(self, tmp_path: Path) -> None:
        """While it trains ``state_dict`` has the weights that train; when that has ended, the average."""
        watch, trainer, files = run(
            tmp_path, lambda: StochasticWeightAveraging(0.02, swa_epoch_start=2), max_epochs=3
        )
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        mean = (watch.trained[3] + watch.trained[7]) / 2  # what the second and the third epoch began with
        message = (
            "The statistics of BatchNorm in batch-10.ckpt are not those of the averaged weights. "
            "torch.optim.swa_utils.update_bn computes them."
        )
        with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
            assert torch.allclose(weight(batch(10, files), "averaged"), mean)
        assert weight(batch(10, files), "raw").equal(watch.trained[9])
        assert weight(batch(10, files)).equal(watch.trained[9])
        assert torch.allclose(weight(tmp_path / "end.ckpt", "averaged"), mean)
        assert torch.allclose(weight(tmp_path / "end.ckpt"), mean)
        assert weight(tmp_path / "end.ckpt", "raw").equal(watch.trained[-1])

    def test_files_of_weights_only(self, tmp_path: Path) -> None:
        for make, name in (
            (WeightAveraging, "mean"),
            (lambda: StochasticWeightAveraging(0.02, 1), "stochastic"),
        ):
            _, trainer, _ = run(tmp_path / name, make)
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
            held = load(tmp_path / f"{name}.ckpt")["state_dict"][WEIGHT]
            assert weight(tmp_path / f"{name}.ckpt", "averaged").equal(held)
            with pytest.raises(CheckpointIncompatible) as error:
                weight(tmp_path / f"{name}.ckpt", "raw")
            assert str(error.value) == (
                f"{name}.ckpt holds averaged weights only, and not those that trained: a file of weights only has "
                "no place for both, and Lightning's callbacks drop them when training ends. Load a full checkpoint "
                "of the run, or leave which_weights='raw' out for the average."
            )

    def test_files_without_an_average(self, tmp_path: Path) -> None:
        _, trainer, files = run(tmp_path, pl.Callback)
        trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
        for path in (files[-1], tmp_path / "weights.ckpt"):
            assert weight(path, "raw").equal(weight(path))
            with pytest.raises(CheckpointIncompatible) as error:
                weight(path, "averaged")
            assert str(error.value) == (
                f"{path.name} holds no averaged weights. It holds the weights that train; no callback that averages "
                "had a part in it. Leave which_weights='averaged' out to load them."
            )

    @pytest.mark.parametrize(
        "make",
        [
            lambda: EMAWeightAveraging(update_starting_at_step=5),
            lambda: StochasticWeightAveraging(0.02, swa_epoch_start=2),
        ],
    )
    def test_files_from_before_the_first_update(self, make: Any, tmp_path: Path) -> None:
        watch, _, files = run(tmp_path, make)
        assert weight(batch(2, files), "raw").equal(watch.trained[1])
        with pytest.raises(CheckpointIncompatible) as error:
            weight(batch(2, files), "averaged")
        assert str(error.value) == (
            "batch-2.ckpt holds no averaged weights. It was saved before the first update of the average and holds "
            "the weights that train alone. Leave which_weights='averaged' out to load them."
        )

    def test_another_word(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as error:
            weight(tmp_path / "none.ckpt", "ema")
        assert str(error.value) == (
            "load_from_checkpoint(which_weights='ema'): expected 'averaged', 'raw', or None for what the checkpoint "
            "has under state_dict."
        )

    def test_a_hook_sees_what_was_chosen(self, tmp_path: Path) -> None:
        watch, _, files = run(tmp_path, WeightAveraging)
        seen: list[Tensor] = []

        class Looks(Normed):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                seen.append(checkpoint["state_dict"][WEIGHT].clone())

        Looks.load_from_checkpoint(batch(3, files), which_weights="raw")
        assert seen[0].equal(watch.trained[2])


def test_without_its_callback_a_run_goes_on_from_the_average_and_says_so(tmp_path: Path) -> None:
    _, _, files = run(tmp_path, WeightAveraging)
    watch = Watch()
    message = (
        "batch-3.ckpt has averaged weights under state_dict, and this trainer has no callback that takes those that "
        "trained out of it: training goes on from the average. Give the trainer the callback that the run was "
        "started with."
    )
    with (
        pytest.warns(UserWarning, match=f"^{re.escape(message)}$"),
        pytest.warns(UserWarning, match="holds the state of callbacks that this trainer does not have"),
    ):
        fit(tmp_path / "on", Normed, lambda: [watch], batch(3, files))
    assert watch.first is not None
    assert watch.first.equal(weight(batch(3, files), "averaged"))


@pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business
class TestLightningsFiles:
    @pytest.fixture
    def lightning(self) -> Any:
        return pytest.importorskip("lightning.pytorch")

    @staticmethod
    def train(lightning: Any, root: Path, callback: Any, net: Any = Normed) -> list[Tensor]:
        """Three epochs of Lightning, which leave a file of each and one of the end; the weights of each step."""

        class Model(lightning.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.net = net.make_net(self)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return (self.net(batch[0]) - batch[1]).square().mean()

            def on_train_batch_end(self, *args: Any) -> None:
                trained.append(self.net[0].weight.detach().clone())

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.05)

        trained: list[Tensor] = []
        every = lightning.callbacks.ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=3, logger=False, callbacks=[callback, every],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        )  # fmt: skip
        trainer.fit(Model(), rows())
        trainer.save_checkpoint(root / "end.ckpt")
        return trained

    def test_weight_averaging(self, lightning: Any, tmp_path: Path) -> None:
        trained = self.train(lightning, tmp_path, lightning.callbacks.WeightAveraging())
        path = tmp_path / "epoch=1.ckpt"
        assert weight(path, "raw").equal(trained[7])
        assert torch.allclose(weight(path, "averaged"), torch.stack(trained[:8]).mean(0), atol=1e-6)
        assert weight(path).equal(weight(path, "averaged"))
        with pytest.raises(CheckpointIncompatible, match=r"^end\.ckpt holds averaged weights only"):
            weight(tmp_path / "end.ckpt", "raw")

    @pytest.mark.parametrize("net", [Normed, Small])
    def test_stochastic_weight_averaging(self, net: Any, lightning: Any, tmp_path: Path) -> None:
        callback = lightning.callbacks.StochasticWeightAveraging(0.02, swa_epoch_start=2)
        trained = self.train(lightning, tmp_path, callback, net)

        def loaded(name: str, which: str) -> Tensor:
            found = net.load_from_checkpoint(tmp_path / f"{name}.ckpt", which_weights=which)
            return found.net[0].weight.detach()

        assert loaded("epoch=1", "raw").equal(trained[7])
        assert torch.allclose(loaded("epoch=1", "averaged"), trained[3])
        assert torch.allclose(loaded("end", "averaged"), (trained[3] + trained[7]) / 2)
        with pytest.raises(CheckpointIncompatible, match=r"^end\.ckpt holds averaged weights only"):
            loaded("end", "raw")
