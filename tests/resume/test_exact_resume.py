"""A run that is stopped at a safe point and resumed is, bit for bit, the run that was never stopped.

Each test trains a small case whole, saving at its safe points, and then starts again from some of the files
with a fresh model whose weights and generators are different. What must be equal: every row seen, augmented
input, loss, logged value and hook from there on; the final weights; the whole final checkpoint, which holds
the optimizer, the schedulers, the scaler and the callbacks; and the numbers that each generator draws next.
What other trainers are known to have got wrong has tests of its own: test_known_failures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import holdfast

from .cases import Case, module_class, train_loader
from .harness import (
    assert_resumes_exactly,
    one_inside,
    spread,
)
from .tape import Tape

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches:UserWarning",
)

PLAIN = Case()
VALIDATED = {"validation": "plain"}
RANDOM = {"dropout": True, "batch_norm": True, "augment": ("torch", "numpy", "random")}

CASES = {
    # the data and its order
    "shuffle": Case(),
    "no shuffle": Case(shuffle=False),
    "drop_last": Case(drop_last=True),
    "a loader's own generator": Case(own_generator=True),
    "a weighted sampler": Case(sampler="weighted"),
    "a weighted sampler and its own generator": Case(sampler="weighted", own_generator=True),
    "a sampler that shuffles by set_epoch": Case(sampler="epoch"),
    "a batch sampler of the user's": Case(sampler="batch"),
    "a random split": Case(subset=True, augment=("torch",)),
    "a collate function that draws": Case(collate=True),
    "augmentation from torch": Case(augment=("torch",)),
    "augmentation from numpy": Case(augment=("numpy",)),
    "augmentation from random": Case(augment=("random",)),
    "fewer batches than the loader has": Case(trainer={"limit_train_batches": 5}),
    # the model
    "dropout": Case(dropout=True),
    "batch norm": Case(batch_norm=True),
    "everything random": Case(**RANDOM, optimizer="adam", own_generator=True),
    # schedulers: the learning rate is in the optimizers of the final checkpoint
    "OneCycleLR each step": Case(scheduler="onecycle"),
    "StepLR each epoch": Case(scheduler="step"),
    "MultiStepLR every second step": Case(scheduler="multistep"),
    "ReduceLROnPlateau on the epoch's loss": Case(scheduler="plateau", trainer={"max_epochs": 4}),
    "ReduceLROnPlateau on validation": Case(scheduler="plateau", **VALIDATED, trainer={"max_epochs": 4}),
    # accumulation: a file saved inside a window holds the gradients so far
    "accumulation over 3": Case(trainer={"accumulate_grad_batches": 3}),
    "accumulation and OneCycleLR": Case(scheduler="onecycle", trainer={"accumulate_grad_batches": 3}),
    "accumulation and clipping": Case(
        optimizer="adam", trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    ),
    "clipping by norm": Case(loss_factor=10, trainer={"gradient_clip_val": 0.5}),
    "clipping by value": Case(
        loss_factor=10, trainer={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    ),
    # precision
    "bf16-mixed": Case(trainer={"precision": "bf16-mixed"}, dropout=True),
    "16-mixed with overflows": Case(trainer={"precision": "16-mixed"}, loss_factor=64, optimizer="adam"),
    "16-mixed, clipped and accumulated": Case(
        trainer={"precision": "16-mixed", "gradient_clip_val": 0.5, "accumulate_grad_batches": 3}
    ),
    # validation
    "validation after each epoch": Case(**VALIDATED),
    "validation in the middle of the epoch": Case(**VALIDATED, trainer={"val_check_interval": 0.5}),
    "validation every third batch": Case(**VALIDATED, trainer={"val_check_interval": 3}),
    "validation every second epoch": Case(
        **VALIDATED, trainer={"check_val_every_n_epoch": 2, "max_epochs": 4}
    ),
    "a validation loader that shuffles": Case(validation="shuffled", trainer={"val_check_interval": 0.5}),
    "a validation that draws": Case(validation="drawing", **RANDOM, trainer={"val_check_interval": 0.5}),
    "without a sanity check": Case(**VALIDATED, trainer={"num_sanity_val_steps": 0}),
    # callbacks
    "EarlyStopping": Case(**VALIDATED, early_stopping=True, trainer={"max_epochs": 5}),
    "EarlyStopping in the middle of the epoch": Case(
        **VALIDATED, early_stopping=True, trainer={"max_epochs": 3, "val_check_interval": 0.5}
    ),
    "EarlyStopping on the epoch's loss": Case(early_stopping=True, trainer={"max_epochs": 5}),
    # code of the user's that runs at the end of a batch
    "a target network moved by the module": Case(target="module"),
    "a target network moved by a callback": Case(target="callback"),
    "a target network and accumulation": Case(target="module", trainer={"accumulate_grad_batches": 3}),
    "two optimizers stepped by hand": Case(manual=True),
    "two optimizers stepped by hand, validated": Case(manual=True, dropout=True, **VALIDATED),
    "a learning rate set in optimizer_step": Case(extra="warmup"),
    "a counter in the module's on_save_checkpoint": Case(extra="counter"),
    "layers frozen in the second epoch": Case(extra="frozen", batch_norm=True, optimizer="adam"),
    "gradients kept from step to step": Case(extra="keeps gradients"),
    # the end of the run
    "max_steps in the middle of an epoch": Case(trainer={"max_steps": 11, "max_epochs": -1}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_resumes_exactly(case: Case, tmp_path: Path) -> None:
    assert_resumes_exactly(case, tmp_path)


class TestValidationPlaces:
    """Files saved when validation ended, in the middle of an epoch and at its end."""

    @pytest.mark.parametrize("interval", [0.5, 1.0, 3])
    def test_from_each(self, interval: float, tmp_path: Path) -> None:
        case = Case(**RANDOM, validation="drawing", trainer={"val_check_interval": interval})
        whole = assert_resumes_exactly(case, tmp_path, lambda outcome: outcome.of_kind("validation"))
        assert len(whole.of_kind("validation")) >= 2


class TestTheSameCommand:
    """A run stopped by an exception and started again with ckpt_path="auto", as a user has it: CSV and all."""

    @pytest.mark.parametrize("step", [6, 8, 13])
    def test_ends_with_the_same_files(self, step: int, tmp_path: Path) -> None:
        fit_as_users_do(tmp_path / "whole")
        with pytest.raises(KeyError, match="stopped on purpose"):
            fit_as_users_do(tmp_path / "stopped", stop_at=step)
        again = fit_as_users_do(tmp_path / "stopped")
        assert Path(again.resumed_from).name == "last.ckpt"
        whole, stopped = (contents(tmp_path / name / "csv" / "version_0") for name in ("whole", "stopped"))
        assert sorted(whole) == sorted(stopped)
        assert whole["metrics.csv"] == stopped["metrics.csv"]

    def test_starts_anew_where_nothing_was_saved_yet(self, tmp_path: Path) -> None:
        fit_as_users_do(tmp_path / "whole")
        with pytest.raises(KeyError, match="stopped on purpose"):
            fit_as_users_do(tmp_path / "stopped", stop_at=1)
        again = fit_as_users_do(tmp_path / "stopped")
        assert again.resumed_from is None
        whole = contents(tmp_path / "whole" / "csv" / "version_0")
        assert contents(Path(again.log_dir))["metrics.csv"] == whole["metrics.csv"]

    def test_last_goes_on_from_the_newest(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError, match="stopped on purpose"):
            fit_as_users_do(tmp_path, stop_at=13)
        again = fit_as_users_do(tmp_path, ckpt_path="last")
        assert Path(again.resumed_from).name == "last.ckpt"
        assert again.global_step == 16


def fit_as_users_do(root: Path, stop_at: int | None = None, ckpt_path: str = "auto") -> Any:
    """Two epochs with a CSV logger, the best two and the newest kept, saved every second step."""

    class Stop(holdfast.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == stop_at:
                raise KeyError("stopped on purpose")

    holdfast.seed_everything(1)
    saving = holdfast.callbacks.ModelCheckpoint(
        monitor="loss_step", save_top_k=2, every_n_train_steps=2, save_last=True
    )
    trainer = holdfast.Trainer(
        accelerator="cpu",
        default_root_dir=root,
        logger=holdfast.loggers.CSVLogger(root, name="csv"),
        log_every_n_steps=1,
        callbacks=[saving, Stop()],
        max_epochs=2,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    case = Case(**RANDOM, scheduler="onecycle")
    trainer.fit(module_class(holdfast, None)(case, Tape()), train_loader(case), ckpt_path=ckpt_path)
    return trainer


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


class TestStreams:
    """An iterable without state is read again from its start."""

    def test_with_workers(self, tmp_path: Path) -> None:
        assert_resumes_exactly(Case(iterable=True, shuffle=False, workers=2), tmp_path, one_inside)

    def test_resumes_exactly(self, tmp_path: Path) -> None:
        assert_resumes_exactly(Case(iterable=True, shuffle=False, dropout=True), tmp_path, spread)

    def test_with_augmentation_that_draws(self, tmp_path: Path) -> None:
        case = Case(iterable=True, shuffle=False, augment=("torch", "numpy", "random"))
        assert_resumes_exactly(case, tmp_path, spread)
