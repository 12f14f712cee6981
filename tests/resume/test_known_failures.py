"""What other trainers are known to have got wrong in checkpoints and resumes, each with the test that holds it off.

| what went wrong | where it is tested |
|---|---|
| A stop at some step: other weights, optimizer, learning rate, losses or rows | `TestEveryStep` |
| A second and a third resume inside one epoch drift apart | `TestSeveralResumes` |
| A resume in a later epoch takes the first epoch's order | `TestOrderOfLaterEpochs` |
| Augmentation differs with workers; a validation that draws shifts training | `TestRandomNumbers` |
| A prefetched batch counts as trained, or is left out | `TestPrefetch` |
| After the file of a finished epoch, an epoch is skipped or run twice | `TestEndOfEpochs` |
| A save inside an accumulation window loses gradients; the batches to skip are counted in steps | `TestAccumulation` |
| The gradient scaler is not restored, or restored before it exists | `TestScaler` |
| The learning rate of a scheduler jumps | `TestLearningRates` |
| EarlyStopping's patience and the best score are saved before their update | `TestBestAndPatience` |
| The reload of loaders every few epochs loses its phase | `test_a_resume_keeps_the_phase_the_rows_and_the_bits` in tests/training/test_fit_data.py |
| Data without a length overflows a count | `TestDataWithoutALength` |
| Averaged weights are saved as the ones that train, or are put there by the check before training | `TestAveragedWeights`; holdfast's own callbacks: `TestCheckpoint` and `TestResume` in tests/callbacks/test_weight_averaging.py |
| A validation or the end of an epoch is run twice; counters drift | tests/resume/test_hook_trace.py |
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

import holdfast as pl
from holdfast.callbacks import Callback, EarlyStopping, ModelCheckpoint
from holdfast.checkpoint.load import load
from holdfast.plugins import MixedPrecision
from tests.training.toys import Toy, rows, trainer

from .cases import Case
from .harness import (
    assert_continues,
    assert_resumes_exactly,
    everywhere,
    one_inside,
    rests,
    run,
    tape_difference,
)

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")

RANDOM = {"dropout": True, "batch_norm": True, "augment": ("torch", "numpy", "random")}
VALIDATED = {"validation": "plain"}


class TestEveryStep:
    def test_stopped_at_every_step_of_two_epochs_it_ends_bitwise_equal(self, tmp_path: Path) -> None:
        """At the ends of epochs, and before and after a validation in their middle, too."""
        half = {"val_check_interval": 0.5}
        case = Case(**RANDOM, scheduler="onecycle", validation="shuffled", trainer=half)
        whole = assert_resumes_exactly(case, tmp_path, everywhere)
        assert [len(whole.of_kind(kind)) for kind in ("batch", "validation", "epoch")] == [16, 4, 2]


class TestSeveralResumes:
    @pytest.mark.parametrize("stops", [(2, 4, 6), (1, 2, 3), (3, 11, 13)], ids=str)
    def test_a_second_and_third_resume_inside_one_epoch_stay_aligned(
        self, stops: tuple[int, ...], tmp_path: Path
    ) -> None:
        case = Case(**RANDOM, scheduler="onecycle", own_generator=True)
        whole = run(case, tmp_path / "whole")
        files = whole.files
        for number in stops:
            resumed = run(case, tmp_path / f"from-{number}", files[number])
            assert_continues(whole, resumed, number)
            files = resumed.files


class TestOrderOfLaterEpochs:
    @pytest.mark.parametrize("sampler", [None, "epoch", "weighted", "batch"])
    def test_a_resume_in_a_later_epoch_has_that_epochs_order(
        self, sampler: str | None, tmp_path: Path
    ) -> None:
        case = Case(rows=24, sampler=sampler, trainer={"max_epochs": 3})
        whole = run(case, tmp_path / "whole")
        ids = [event[2] for event in whole.tape if event[0] == "trained"]
        count = len(ids) // 3
        assert len({tuple(ids[start : start + count]) for start in range(0, len(ids), count)}) == 3
        batches = whole.of_kind("batch")
        for number in (batches[count + 1], batches[-2]):
            resumed = run(case, tmp_path / f"from-{number}", whole.files[number], save=False)
            assert_continues(whole, resumed, number)


class TestRandomNumbers:
    @pytest.mark.parametrize("persistent", [False, True])
    def test_augmentation_goes_on_with_workers(self, persistent: bool, tmp_path: Path) -> None:
        assert_resumes_exactly(Case(**RANDOM, workers=2, persistent=persistent), tmp_path, one_inside)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_number_of_workers_changes_nothing(self, workers: int, tmp_path: Path) -> None:
        alone = run(Case(**RANDOM), tmp_path / "alone", save=False)
        helped = run(Case(**RANDOM, workers=workers), tmp_path / "helped", save=False)
        assert tape_difference(list(alone.tape), list(helped.tape)) is None

    def test_a_resume_with_another_number_of_workers(self, tmp_path: Path) -> None:
        whole = run(Case(**RANDOM), tmp_path / "whole")
        resumed = run(Case(**RANDOM, workers=2), tmp_path / "from-5", whole.files[5], save=False)
        assert tape_difference(*rests(whole.tape, 5, resumed.tape)) is None
        assert same(whole.weights, resumed.weights)
        assert whole.draws == resumed.draws

    def test_a_validation_that_draws_does_not_shift_training(self, tmp_path: Path) -> None:
        plain = run(Case(**RANDOM, validation="plain"), tmp_path / "plain", save=False)
        drawing = run(Case(**RANDOM, validation="drawing"), tmp_path / "drawing", save=False)
        found = [
            [[event for event in one.tape if event[0] == kind] for one in (plain, drawing)]
            for kind in ("validated", "trained")
        ]
        assert found[0][0] != found[0][1], "the validation rows are augmented"
        assert found[1][0] == found[1][1]


class TestPrefetch:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_position_is_neither_ahead_nor_behind(self, workers: int, tmp_path: Path) -> None:
        """Each file of a run resumed from the file before is of one step later, however often that goes on."""
        case = Case(**RANDOM, workers=workers, trainer={"max_epochs": 1 if workers else 2})
        whole = run(case, tmp_path / "whole")
        files = whole.files
        for number in range(1, len(whole.files)):
            resumed = run(case, tmp_path / f"from-{number}", files[number])
            assert min(resumed.files) == number + 1
            files = resumed.files
        assert_continues(whole, resumed, number)


class TestEndOfEpochs:
    def test_no_epoch_is_skipped_or_run_twice(self, tmp_path: Path) -> None:
        case = Case(rows=12, trainer={"max_epochs": 4})
        whole = assert_resumes_exactly(case, tmp_path, lambda outcome: outcome.of_kind("epoch"))
        orders = [event[2] for event in whole.tape if event[0] == "trained"]
        epochs = [orders[start : start + 3] for start in range(0, 12, 3)]
        assert all(sorted(sum(epoch, ())) == list(range(12)) for epoch in epochs)

    def test_the_file_of_a_finished_run_trains_nothing_more(self, tmp_path: Path) -> None:
        case = Case(**VALIDATED)
        whole = run(case, tmp_path / "whole")
        resumed = run(case, tmp_path / "again", whole.files[max(whole.files)], save=False)
        assert "trained" not in {event[0] for event in resumed.tape}
        assert same(whole.weights, resumed.weights)

    def test_the_file_of_a_finished_run_goes_on_with_more_epochs(self, tmp_path: Path) -> None:
        longer = {"max_epochs": 3}
        whole = run(Case(**VALIDATED, trainer=longer), tmp_path / "whole")
        short = run(Case(**VALIDATED), tmp_path / "short")
        resumed = run(Case(**VALIDATED, trainer=longer), tmp_path / "on", short.files[max(short.files)])
        assert_continues(whole, resumed, max(short.files))


class TestAccumulation:
    def test_a_file_saved_inside_a_window_loses_no_gradient(self, tmp_path: Path) -> None:
        """Epochs of 8 batches in windows of 3: the last window of each is short."""
        case = Case(dropout=True, trainer={"accumulate_grad_batches": 3})
        assert_resumes_exactly(case, tmp_path, everywhere)

    def test_the_batches_to_skip_are_batches_and_not_steps(self, tmp_path: Path) -> None:
        def train(root: Path, path: Path | None = None) -> list[int]:
            model = Toy()
            saves = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
            run = trainer(callbacks=saves, accumulate_grad_batches=4)
            run.fit(model, rows(24, 2), ckpt_path=path)
            return model.seen

        assert train(tmp_path) == list(range(24))
        for steps in (1, 2, 3):
            assert train(tmp_path / "on", tmp_path / f"step={steps}.ckpt") == list(range(8 * steps, 24))


class TestScaler:
    def test_its_scale_goes_on(self, tmp_path: Path) -> None:
        """It halves where gradients overflow and doubles after two steps where they do not."""

        class Overflows(Toy):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                # At the step in the middle of the epoch, whatever the scale.
                return super().training_step(batch, batch_idx) * (1e38 if batch_idx == 2 else 1.0)

        class Scales(Callback):
            def __init__(self) -> None:
                self.seen: list[Any] = []

            def note(self, trainer: Any, *rest: Any) -> None:
                state = trainer.scaler.state_dict()
                self.seen.append((trainer.global_step, state["scale"], state["_growth_tracker"]))

            on_train_start = on_train_batch_end = note

        def train(root: Path, path: Path | None = None) -> list[Any]:
            scales = Scales()
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
            saves = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
            run = trainer(
                max_epochs=2,
                callbacks=[scales, saves],
                plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler),
            )
            run.fit(Overflows(), rows(20), ckpt_path=path)
            return scales.seen

        whole = train(tmp_path)
        assert len({scale for _, scale, _ in whole}) > 2, "it went up and down"
        for path in sorted(tmp_path.glob("*.ckpt")):
            step = int(path.stem.partition("=")[2])
            stood = [index for index, one in enumerate(whole) if one[0] == step][-1]
            assert train(tmp_path / "on", path) == whole[stood:], path.name


SCHEDULERS: dict[str, Any] = {
    "OneCycleLR": lambda optimizer: {
        "scheduler": lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12),
        "interval": "step",
    },
    "MultiStepLR": lambda optimizer: {
        "scheduler": lr_scheduler.MultiStepLR(optimizer, [2, 3, 7], 0.5),
        "interval": "step",
    },
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "StepLR every second step": lambda optimizer: {
        "scheduler": lr_scheduler.StepLR(optimizer, 2, 0.5),
        "interval": "step",
        "frequency": 2,
    },
    "ReduceLROnPlateau": lambda optimizer: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9),
        "monitor": "loss",
    },
    "ReduceLROnPlateau each step": lambda optimizer: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.9),
        "monitor": "loss",
        "interval": "step",
    },
    "warm-up, then cosine": lambda optimizer: {
        "scheduler": lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
                lr_scheduler.CosineAnnealingLR(optimizer, 8),
            ],
            [4],
        ),
        "interval": "step",
    },
}


class TestLearningRates:
    @pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
    def test_the_trace_of_each_scheduler_goes_on(self, make: Any, tmp_path: Path) -> None:
        class Scheduled(Toy):
            def __init__(self) -> None:
                super().__init__()
                self.rates: list[float] = []

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.rates.append(self.optimizers().param_groups[0]["lr"])
                loss = super().training_step(batch, batch_idx)
                self.log("loss", loss)
                return loss

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
                return [optimizer], [make(optimizer)]

        def train(root: Path, path: Path | None = None) -> list[float]:
            pl.seed_everything(2, verbose=False)
            saves = [
                ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1),
                ModelCheckpoint(root, "end-{step}", save_top_k=-1),
            ]
            model = Scheduled()
            trainer(max_epochs=4, callbacks=saves).fit(model, rows(), ckpt_path=path)
            return model.rates

        whole = train(tmp_path)
        assert len(whole) == 12 and len(set(whole)) > 2
        files = sorted(tmp_path.glob("*.ckpt"))
        assert len(files) == 16
        for path in files:
            assert train(tmp_path / "on", path) == whole[int(path.stem.partition("step=")[2]) :], path.name


class TestBestAndPatience:
    def test_patience_is_in_the_file_of_the_epoch_that_used_it(self, tmp_path: Path) -> None:
        class Worse(Toy):
            def on_train_epoch_end(self) -> None:
                self.log("score", float(self.current_epoch))

        stopping = EarlyStopping("score", patience=3)
        saves = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", save_top_k=-1)
        # Whichever comes first: what is saved is saved after every hook.
        run = trainer(max_epochs=9, callbacks=[saves, stopping])
        run.fit(Worse(), rows())
        found = []
        for path in sorted(tmp_path.glob("*.ckpt")):
            states = load(path)["callbacks"]
            found.append(
                (
                    states[stopping.state_key]["wait_count"],
                    float(states[stopping.state_key]["best_score"]),
                    float(states[saves.state_key]["best_model_score"]),
                    float(states[saves.state_key]["current_score"]),
                )
            )
        assert found == [(0, 0.0, 0.0, 0.0), (1, 0.0, 0.0, 1.0), (2, 0.0, 0.0, 2.0), (3, 0.0, 0.0, 3.0)]

    def test_early_stopping_stops_at_the_same_epoch(self, tmp_path: Path) -> None:
        case = Case(
            **VALIDATED,
            early_stopping=True,
            scheduler="step",
            trainer={"max_epochs": 30, "log_every_n_steps": 50},
        )
        whole = assert_resumes_exactly(case, tmp_path, lambda outcome: outcome.of_kind("epoch"))
        epochs = whole.tape.names("callback").count("on_train_epoch_start")
        assert 2 < epochs < 30, "patience ran out before the epochs did"

    def test_model_checkpoint_keeps_the_same_best(self, tmp_path: Path) -> None:
        """Resumed in a copy of the run's directory, so that the best files of before are there."""
        case = Case(**VALIDATED, best_k=2, trainer={"max_epochs": 4})
        whole = run(case, tmp_path / "whole")
        names = sorted(path.name for path in (tmp_path / "whole" / "best").iterdir())
        assert len(names) == 3 and "last.ckpt" in names
        early = run(Case(**VALIDATED, best_k=2, trainer={"max_epochs": 2}), tmp_path / "early")
        for number in (max(early.files), early.of_kind("batch")[-2]):
            place = tmp_path / f"from-{number}"
            shutil.copytree(tmp_path / "early", place)
            resumed = run(case, place, place / "points" / f"{number:03d}.ckpt")
            assert sorted(path.name for path in (place / "best").iterdir()) == names
            assert_continues(whole, resumed, number)


class Endless(IterableDataset[Any]):
    """Rows without a length; ``count`` of them, or no end at all."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while number != self.count:
            yield torch.full((3,), number / 12), number
            number += 1


class TestDataWithoutALength:
    @pytest.mark.parametrize("count", [12, None], ids=["an end", "no end"])
    @pytest.mark.parametrize(
        "validation",
        [
            {"val_check_interval": 1},
            {"val_check_interval": 2},
            {"val_check_interval": 2, "check_val_every_n_epoch": None},
        ],
        ids=["each batch", "every second batch", "across epochs"],
    )
    def test_no_count_overflows(self, count: int | None, validation: dict[str, Any], tmp_path: Path) -> None:
        class Validated(Toy):
            def __init__(self) -> None:
                super().__init__()
                self.validated_at: list[int] = []

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.validated_at.append(self.trainer.global_step)

        def train(root: Path, path: Path | None = None) -> tuple[list[int], list[int], Any]:
            saves = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
            limits = {"max_epochs": 2} if count else {"max_epochs": -1, "max_steps": 6}
            run = trainer(callbacks=saves, num_sanity_val_steps=0, **limits, **validation)
            model = Validated()
            run.fit(model, DataLoader(Endless(count), 4), DataLoader(Endless(4), 4), ckpt_path=path)
            return model.seen, model.validated_at, (run.current_epoch, run.num_training_batches)

        seen, validated_at, counts = train(tmp_path)
        assert seen == ([*range(12)] * 2 if count else [*range(24)])
        files = sorted(tmp_path.glob("*.ckpt"))
        assert len(files) == 6
        for path in files:
            step = int(path.stem.partition("=")[2])
            # The file of a step is saved before the validation that follows it.
            still = [at for at in validated_at if at >= step]
            assert train(tmp_path / "on", path) == (seen[4 * step :], still, counts), path.name


class Swaps(Callback):
    """An average of the weights as people write it: in the model's place while it is validated."""

    def __init__(self) -> None:
        self.average: dict[str, torch.Tensor] = {}
        self.raw: dict[str, torch.Tensor] | None = None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.average = self.average or copy.deepcopy(module.state_dict())

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        for name, value in module.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.raw = copy.deepcopy(module.state_dict())
        module.load_state_dict(self.average)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        module.load_state_dict(self.raw)
        self.raw = None

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = {name: value.clone() for name, value in state["average"].items()}


class TestAveragedWeights:
    def test_what_is_saved_on_a_validation_are_the_weights_that_train(self, tmp_path: Path) -> None:
        """Resumed by runs that would, if they were new, check the validation before training."""

        class Validated(Toy):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                self.log("val_loss", self.loss(batch))

        class Raw(Callback):
            def __init__(self) -> None:
                self.at: dict[int, Any] = {}

            def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
                if not trainer.sanity_checking:
                    assert swaps[-1].raw is not None
                    self.at[trainer.global_step] = copy.deepcopy(swaps[-1].raw)

        swaps: list[Swaps] = []

        def train(root: Path, path: Path | None = None) -> list[Any]:
            pl.seed_everything(5, verbose=False)
            swaps.append(Swaps())
            raw = Raw()
            saves = ModelCheckpoint(
                root, "{step}", monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=False
            )
            run = trainer(max_epochs=2, callbacks=[swaps[-1], raw, saves], val_check_interval=1)
            model = Validated()
            run.fit(model, rows(), rows(), ckpt_path=path)
            for step, weights in raw.at.items():
                assert same(load(root / f"step={step}.ckpt")["state_dict"], weights), step
            return [model.state_dict(), swaps[-1].average]

        whole = train(tmp_path)
        files = sorted(tmp_path.glob("*.ckpt"))
        assert len(files) == 6
        assert not same(whole[0], whole[1])
        for path in files:
            resumed = train(tmp_path / f"on-{path.stem}", path)
            assert same(resumed[0], whole[0]) and same(resumed[1], whole[1]), path.name


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(value.equal(theirs[name]) for name, value in mine.items())
