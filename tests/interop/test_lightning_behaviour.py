"""What Lightning does in a run, holdfast does: the same hooks in the same order, values, files and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import holdfast
from resume.tape import MODULE_HOOKS, Tape, bits, recording_callback, with_recorded_hooks

from .regression import csv_rows, make_trainer, module_class, tree

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

HOOKS = (
    *MODULE_HOOKS,
    "configure_optimizers",
    "train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader",
    "training_step", "validation_step", "test_step", "predict_step", "forward",
)  # fmt: skip

RUNS = {
    "two epochs": {},
    "two validations an epoch": {"val_check_interval": 0.5},
    "validation every third batch": {"val_check_interval": 3},
    "validation every second epoch": {"check_val_every_n_epoch": 2},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "no validation": {"limit_val_batches": 0},
    "no sanity check": {"num_sanity_val_steps": 0},
    "few batches": {"limit_train_batches": 3, "limit_val_batches": 1},
    "max_steps": {"max_steps": 11},
    "fast_dev_run": {"fast_dev_run": True},
    "bf16": {"precision": "bf16-mixed"},
}


def seed(pl: Any) -> None:
    pl.seed_everything(3, verbose=False) if pl is lightning else pl.seed_everything(3)


def record(pl: Any, root: Path, verb: str = "fit", scheduler: str = "onecycle", **arguments: Any) -> Tape:
    tape = Tape()
    seed(pl)
    module = with_recorded_hooks(module_class(pl), tape, HOOKS)(scheduler=scheduler)
    callbacks = [recording_callback(pl, tape)]
    trainer = make_trainer(pl, root, **{"max_epochs": 2, "callbacks": callbacks, **arguments})
    getattr(trainer, verb)(module)
    return tape


class TestHooks:
    @pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS.keys())
    def test_of_a_fit(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        theirs = record(lightning, tmp_path / "theirs", **arguments)
        assert len(theirs) > 40
        assert record(holdfast, tmp_path / "mine", **arguments) == theirs

    @pytest.mark.parametrize("scheduler", ["step", "plateau"])
    def test_of_a_fit_with_a_scheduler_of_epochs(self, scheduler: str, tmp_path: Path) -> None:
        theirs = record(lightning, tmp_path / "theirs", scheduler=scheduler)
        assert record(holdfast, tmp_path / "mine", scheduler=scheduler) == theirs

    @pytest.mark.parametrize("verb", ["validate", "test", "predict"])
    def test_of_an_evaluation(self, verb: str, tmp_path: Path) -> None:
        theirs = record(lightning, tmp_path / "theirs", verb)
        assert record(holdfast, tmp_path / "mine", verb) == theirs


def watch_metrics(pl: Any, tape: Tape) -> Any:
    """A callback that records the three dicts of metrics wherever people read them."""

    def look(where: str) -> Any:
        def hook(self: Any, trainer: Any, *args: Any) -> None:
            for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
                values = {key: bits(float(value)) for key, value in getattr(trainer, name).items()}
                tape.record(where, name, tuple(sorted(values.items())))

        return hook

    places = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end")
    return type("WatchMetrics", (pl.Callback,), {place: look(place) for place in places})()


class TestLoggedValues:
    @pytest.mark.parametrize(
        "arguments",
        [{}, {"val_check_interval": 0.5}, {"accumulate_grad_batches": 3}, {"log_every_n_steps": 1}],
        ids=str,
    )
    def test_metrics_and_csv(self, arguments: dict[str, Any], tmp_path: Path) -> None:
        tapes, rows = [], []
        for pl in (lightning, holdfast):
            root, tape = tmp_path / pl.__name__, Tape()
            seed(pl)
            logger = pl.loggers.CSVLogger(root, name="csv", version="v")
            options = {"logger": logger, "log_every_n_steps": 2, "num_sanity_val_steps": 0, **arguments}
            trainer = make_trainer(pl, root, callbacks=[watch_metrics(pl, tape)], **options)
            trainer.fit(module_class(pl)())
            tapes.append(tape)
            rows.append(csv_rows(root / "csv" / "v" / "metrics.csv"))
        assert len(rows[0]) > 4
        assert rows[1] == rows[0]
        for index, (theirs, mine) in enumerate(zip(*tapes, strict=True)):
            assert mine == theirs, f"reading {index}"

    @pytest.mark.parametrize("verb", ["validate", "test"])
    def test_evaluation_returns(self, verb: str, tmp_path: Path) -> None:
        results = []
        for pl in (lightning, holdfast):
            seed(pl)
            trainer = make_trainer(pl, tmp_path / pl.__name__)
            results.append(getattr(trainer, verb)(module_class(pl)(), verbose=False))
        assert results[0] and results[1] == results[0]

    def test_predictions(self, tmp_path: Path) -> None:
        batches = []
        for pl in (lightning, holdfast):
            seed(pl)
            batches.append(make_trainer(pl, tmp_path / pl.__name__).predict(module_class(pl)()))
        assert len(batches[0]) == len(batches[1]) == 3
        assert all(theirs.equal(mine) for theirs, mine in zip(*batches, strict=True))


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every epoch kept": {"save_top_k": -1},
    "nothing kept": {"save_top_k": 0},
    "last": {"save_last": True},
    "the best two": {"monitor": "val_loss", "save_top_k": 2},
    "the best by the largest": {"monitor": "val_loss", "mode": "max"},
    "the best two and last": {"monitor": "val_worst", "save_top_k": 2, "save_last": True},
    "a template": {"filename": "sample-{epoch:02d}-{val_loss:.2f}", "save_top_k": -1},
    "a template without names": {
        "filename": "{epoch:02d}-{val_loss:.3f}", "auto_insert_metric_name": False, "save_top_k": -1
    },
    "one name for all, not counted": {"filename": "model", "save_top_k": -1, "enable_version_counter": False},
    "one name for the best": {"filename": "model", "monitor": "val_loss"},
    "every third step": {"every_n_train_steps": 3, "save_top_k": -1},
    "every third step, the newest": {"every_n_train_steps": 3},
    "every second epoch": {"every_n_epochs": 2, "save_top_k": -1},
    "at the end of the training epoch": {"save_on_train_epoch_end": True, "save_top_k": -1},
    "weights alone": {"save_weights_only": True},
}  # fmt: skip
NAMES = ("best_model_path", "last_model_path", "kth_best_model_path")
SCORES = ("best_model_score", "current_score", "kth_value")


class TestModelCheckpoint:
    @pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
    @pytest.mark.parametrize("arguments", [{}, {"val_check_interval": 0.5}], ids=["epoch", "half epoch"])
    def test_names_of_files(self, options: dict[str, Any], arguments: dict[str, Any], tmp_path: Path) -> None:
        trees, states = [], []
        for pl in (lightning, holdfast):
            root = tmp_path / pl.__name__
            seed(pl)
            callback = pl.callbacks.ModelCheckpoint(**options)
            logger = pl.loggers.CSVLogger(root)
            trainer = make_trainer(pl, root, callbacks=[callback], logger=logger, **arguments)
            trainer.fit(module_class(pl)())
            trees.append(tree(root))
            paths = {name: getattr(callback, name).replace(str(root), "") for name in NAMES}
            scores = {name: getattr(callback, name) for name in SCORES}
            numbers = {name: None if score is None else float(score) for name, score in scores.items()}
            kept = {
                path.replace(str(root), ""): float(score) for path, score in callback.best_k_models.items()
            }
            states.append({**paths, **numbers, "best_k_models": kept})
        assert trees[1] == trees[0]
        assert states[1] == states[0]

    def test_keeps_all_under_one_name(self, tmp_path: Path) -> None:
        """Here Lightning writes over the file of before, although save_top_k=-1 asks for all of them."""
        seed(holdfast)
        callback = holdfast.callbacks.ModelCheckpoint(
            dirpath=tmp_path / "all", filename="model", save_top_k=-1
        )
        make_trainer(holdfast, tmp_path, callbacks=[callback]).fit(module_class(holdfast)())
        assert tree(tmp_path / "all") == ["model-v1.ckpt", "model-v2.ckpt", "model.ckpt"]

    def test_default_places(self, tmp_path: Path) -> None:
        """A CSV logger and the trainer's own checkpoint callback, run twice in one directory."""
        trees = []
        for pl in (lightning, holdfast):
            root = tmp_path / pl.__name__
            for _ in range(2):
                logger = pl.loggers.CSVLogger(root) if pl is lightning else True  # ours without being asked
                make_trainer(pl, root, max_epochs=1, logger=logger).fit(module_class(pl)())
            trees.append(tree(root))
        assert trees[1] == trees[0]
