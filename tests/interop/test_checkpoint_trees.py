"""ModelCheckpoint and Lightning's side by side: the same files and attributes wherever the meaning is the same.

What is different on purpose has its tests in tests/callbacks/test_quirks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

import holdfast

from .regression import make_trainer, module_class, tree

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

PATHS = ("best_model_path", "last_model_path", "kth_best_model_path", "dirpath")
SCORES = ("best_model_score", "current_score", "kth_value")


def published(callback: Any, root: Path) -> dict[str, Any]:
    """What people read of a ModelCheckpoint, with paths relative to ``root``."""
    scores = {name: getattr(callback, name) for name in SCORES}
    return {
        **{name: str(getattr(callback, name)).replace(str(root), "") for name in PATHS},
        **{name: None if score is None else float(score) for name, score in scores.items()},
        "best_k_models": {
            path.replace(str(root), ""): float(score) for path, score in callback.best_k_models.items()
        },
        "state_key": callback.state_key,
        "every_n_epochs": callback.every_n_epochs,
    }


def run(pl: Any, root: Path, make: Callable[[Any, Path], Any], arguments: dict[str, Any]) -> Any:
    """Fit once, and tell the files and what each callback shows."""
    pl.seed_everything(3)
    made = make(pl, root)
    callbacks = made if isinstance(made, list) else [made]
    options = dict(arguments)
    if "logger" in options:
        options["logger"] = options["logger"](pl, root)
    make_trainer(pl, root, callbacks=callbacks, **options).fit(module_class(pl)())
    saving = [one for one in callbacks if isinstance(one, pl.callbacks.ModelCheckpoint)]
    return tree(root), [published(one, root) for one in saving]


def both(tmp_path: Path, make: Callable[[Any, Path], Any], **arguments: Any) -> None:
    theirs = run(lightning, tmp_path / "theirs", make, arguments)
    assert run(holdfast, tmp_path / "mine", make, arguments) == theirs


def one(**options: Any) -> Callable[[Any, Path], Any]:
    return lambda pl, root: pl.callbacks.ModelCheckpoint(dirpath=root / "c", **options)


def named(**attributes: Any) -> Callable[..., Callable[[Any, Path], Any]]:
    """A subclass with these class attributes."""

    def with_options(**options: Any) -> Callable[[Any, Path], Any]:
        return lambda pl, root: type("Named", (pl.callbacks.ModelCheckpoint,), attributes)(
            root / "c", **options
        )

    return with_options


def counted(pl: Any, root: Path) -> Any:
    """A subclass that makes its names itself."""

    class Counted(pl.callbacks.ModelCheckpoint):
        def format_checkpoint_name(
            self, metrics: Any, filename: Any = None, ver: Any = None, prefix: Any = None
        ) -> str:
            usual = Path(super().format_checkpoint_name(metrics, filename, ver, prefix))
            return str(usual.with_name(f"run7-{usual.name}"))

    return Counted(root / "c", monitor="val_loss", save_top_k=2, save_last=True)


OPTIONS: dict[str, tuple[Callable[[Any, Path], Any], dict[str, Any]]] = {
    "the largest two": (one(monitor="val_loss", mode="max", save_top_k=2), {}),
    "all of them, ranked": (one(monitor="val_loss", save_top_k=-1, save_last=True), {}),
    "none but last": (one(save_top_k=0, save_last=True), {}),
    "last where no epoch came due": (one(every_n_epochs=5, save_last=True), {}),
    "last where no step came due": (one(every_n_train_steps=99, save_last=True, monitor="val_loss"), {}),
    "last where nothing is ever due": (one(every_n_epochs=0, save_last=True), {}),
    "last where some steps came due": (one(every_n_train_steps=9, save_last=True), {}),
    "last as a link": (one(save_last="link"), {}),
    "last as a link beside all": (one(save_last="link", save_top_k=-1), {}),
    "the latest steps": (one(monitor="step", mode="max", save_top_k=2), {}),
    "the first epochs": (one(monitor="epoch", save_top_k=2), {}),
    "never by steps": (one(every_n_train_steps=0), {}),
    "never by epochs": (one(every_n_epochs=0), {}),
    "every second epoch, the best": (one(monitor="val_loss", every_n_epochs=2, save_top_k=-1), {}),
    "at any time": (one(train_time_interval=timedelta(seconds=0), save_top_k=-1), {}),
    "at no time": (one(train_time_interval=timedelta(hours=9)), {}),
    "when validation ends": (one(save_on_train_epoch_end=False, save_top_k=-1), {}),
    "when validation ends, twice an epoch": (
        one(save_on_train_epoch_end=False, save_top_k=-1), {"val_check_interval": 0.5}
    ),
    "when training ends, twice an epoch": (
        one(save_on_train_epoch_end=True, save_top_k=-1, monitor="val_loss"), {"val_check_interval": 0.5}
    ),
    "validation every second epoch": (
        one(monitor="val_loss", save_top_k=-1), {"check_val_every_n_epoch": 2, "max_epochs": 4}
    ),
    "validation every third batch": (one(save_top_k=-1), {"val_check_interval": 3}),
    "no validation": (one(monitor="loss", save_top_k=2), {"limit_val_batches": 0}),
    "no validation to wait for": (one(save_on_train_epoch_end=False), {"limit_val_batches": 0}),
    "steps of several batches": (
        one(every_n_train_steps=2, save_top_k=-1), {"accumulate_grad_batches": 3}
    ),
    "an epoch cut short": (one(save_top_k=-1), {"max_steps": 11}),
    "an epoch cut short before its validation": (one(monitor="val_loss"), {"max_steps": 11}),
    "fast_dev_run": (one(every_n_train_steps=1), {"fast_dev_run": 2}),
    "a train metric by steps": (one(monitor="loss_step", every_n_train_steps=3, save_top_k=3), {}),
    "names without versions": (
        one(filename="m", monitor="val_loss", save_top_k=2, enable_version_counter=False), {}
    ),
    "another name for last": (named(CHECKPOINT_NAME_LAST="{epoch}-last")(save_last=True), {}),
    "a constant name for last": (named(CHECKPOINT_NAME_LAST="newest")(save_last=True, save_top_k=0), {}),
    "other signs": (named(CHECKPOINT_EQUALS_CHAR=":", CHECKPOINT_JOIN_CHAR="_")(save_top_k=-1), {}),
    "other numbers": (named(STARTING_VERSION=3)(filename="a", monitor="val_loss", save_top_k=2), {}),
    "another extension": (named(FILE_EXTENSION=".pth")(monitor="val_loss", save_top_k=2), {}),
    "names of its own": (counted, {}),
    "two directories": (
        lambda pl, root: [
            pl.callbacks.ModelCheckpoint(root / "a", monitor="val_loss"),
            pl.callbacks.ModelCheckpoint(root / "b", monitor="val_loss", mode="max"),
        ],
        {},
    ),
    "one directory for three": (
        lambda pl, root: [
            pl.callbacks.ModelCheckpoint(str(root), monitor="val_loss"),
            pl.callbacks.ModelCheckpoint(str(root), monitor="val_loss", mode="max"),
            pl.callbacks.ModelCheckpoint(str(root), save_last=True),
        ],
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "arguments"), OPTIONS.values(), ids=OPTIONS.keys())
def test_files_and_attributes(
    make: Callable[[Any, Path], Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    both(tmp_path, make, **arguments)


LOGGERS: dict[str, Callable[[Any, Path], Any]] = {
    "none": lambda pl, root: False,
    "one": lambda pl, root: pl.loggers.CSVLogger(root / "logs"),
    "with a name and a version": lambda pl, root: pl.loggers.CSVLogger(root / "logs", "run", "second"),
    "with a number": lambda pl, root: pl.loggers.CSVLogger(root / "logs", "run", 7),
    "without a name": lambda pl, root: pl.loggers.CSVLogger(root / "logs", ""),
    "two": lambda pl, root: [pl.loggers.CSVLogger(root / "a"), pl.loggers.CSVLogger(root / "b")],
}


@pytest.mark.parametrize("logger", LOGGERS.values(), ids=LOGGERS.keys())
def test_directories(logger: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    both(tmp_path, lambda pl, root: pl.callbacks.ModelCheckpoint(), logger=logger, max_epochs=1)


HOOKS = [
    ("setup", 1), ("on_sanity_check_start", 1), ("on_train_start", 1), ("on_train_batch_start", 1),
    ("on_before_zero_grad", 3), ("on_before_backward", 4), ("on_after_backward", 5),
    ("on_before_optimizer_step", 11), ("on_train_batch_end", 1), ("on_train_batch_end", 12),
    ("on_validation_start", 2), ("on_validation_batch_start", 4), ("on_validation_end", 3),
    ("on_train_epoch_start", 2), ("on_train_epoch_end", 2), ("on_train_end", 1), ("on_fit_end", 1), ("teardown", 1),
]  # fmt: skip


class Trouble(RuntimeError):
    """What ends the runs below."""


@pytest.mark.parametrize(("hook", "at"), HOOKS, ids=str)
@pytest.mark.parametrize("options", [{}, {"monitor": "val_loss", "save_top_k": 2}], ids=["newest", "best"])
def test_files_after_an_exception(hook: str, at: int, options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for pl in (lightning, holdfast):
        root, calls = tmp_path / pl.__name__, []

        def raising(self: Any, *args: Any, calls: list[Any] = calls, **kwargs: Any) -> None:
            calls.append(args)
            if len(calls) == at:
                raise Trouble

        troubled = type("Troubled", (pl.Callback,), {hook: raising})()
        callback = pl.callbacks.ModelCheckpoint(root / "c", save_on_exception=True, **options)
        pl.seed_everything(3)
        with pytest.raises(Trouble):
            make_trainer(pl, root, callbacks=[troubled, callback]).fit(module_class(pl)())
        found.append((tree(root), published(callback, root)))
    assert found[1] == found[0]


def test_signatures_and_names() -> None:
    """Every public name is there, and what is called by position is in the same place; ours come behind."""
    import inspect

    theirs, mine = lightning.callbacks.ModelCheckpoint, holdfast.callbacks.ModelCheckpoint
    assert [
        name for name in dir(theirs("d")) if not name.startswith("_") and not hasattr(mine("d"), name)
    ] == []
    for method in (
        "__init__", "format_checkpoint_name", "to_yaml", "file_exists", "check_monitor_top_k", "state_dict",
    ):  # fmt: skip
        parameters = [
            [(one.name, one.default) for one in inspect.signature(getattr(cls, method)).parameters.values()]
            for cls in (theirs, mine)
        ]
        ours = (
            [("background", True), ("on_error", "raise"), ("log_cost", False)] if method == "__init__" else []
        )
        assert parameters[1] == parameters[0] + ours, method


def test_to_yaml_and_file_exists(tmp_path: Path) -> None:
    written = []
    for pl in (lightning, holdfast):
        root = tmp_path / pl.__name__
        pl.seed_everything(3)
        callback = pl.callbacks.ModelCheckpoint(root / "c", monitor="val_loss", save_top_k=2)
        trainer = make_trainer(pl, root, callbacks=[callback])
        trainer.fit(module_class(pl)())
        callback.to_yaml()
        callback.to_yaml(root / "elsewhere.yaml")
        texts = [(root / name).read_text() for name in ("c/best_k_models.yaml", "elsewhere.yaml")]
        assert callback.file_exists(callback.best_model_path, trainer)
        assert not callback.file_exists(root / "c" / "none.ckpt", trainer)
        written.append([yaml.safe_load(text.replace(str(root), "")) for text in texts])
    assert written[1] == written[0]


def test_two_fits_of_one_trainer_and_two_trainers_of_one_callback(tmp_path: Path) -> None:
    found = []
    for pl in (lightning, holdfast):
        root = tmp_path / pl.__name__
        pl.seed_everything(3)
        module = module_class(pl)()
        callback = pl.callbacks.ModelCheckpoint(root / "c", monitor="val_loss", save_top_k=-1)
        trainer = make_trainer(pl, root, callbacks=[callback], max_epochs=2)
        trainer.fit(module)
        owner = trainer.fit_loop if pl is lightning else trainer
        owner.max_epochs = 4
        trainer.fit(module)
        again = tree(root), published(callback, root), trainer.current_epoch, trainer.global_step
        make_trainer(pl, root, callbacks=[callback], max_epochs=2).fit(module_class(pl)())
        found.append((again, tree(root), list(published(callback, root)["best_k_models"])))
    assert found[1] == found[0]


def test_best_model_path_stays_after_a_resume_and_after_evaluations(tmp_path: Path) -> None:
    found = []
    for pl in (lightning, holdfast):
        root, seen = tmp_path / pl.__name__, []

        def new(pl: Any = pl, root: Path = root) -> Any:
            return pl.callbacks.ModelCheckpoint(root / "c", monitor="val_loss", save_last=True, save_top_k=-1)

        pl.seed_everything(3)
        callback = new()
        trainer = make_trainer(pl, root, callbacks=[callback])
        trainer.fit(module_class(pl)())
        seen.append(published(callback, root))
        for verb in ("validate", "test", "predict"):
            getattr(trainer, verb)(**({} if verb == "predict" else {"verbose": False}))
            assert trainer.ckpt_path == callback.best_model_path
            seen.append(trainer.ckpt_path.replace(str(root), ""))
        if pl is holdfast:  # theirs takes back what the file of the best knew of the others: itself only
            assert published(callback, root) == seen[0]
        assert trainer.checkpoint_callback is callback and trainer.checkpoint_callbacks == [callback]
        callback = new()
        resumed = make_trainer(pl, root, callbacks=[callback], max_epochs=4)
        resumed.fit(module_class(pl)(), ckpt_path=root / "c" / "last.ckpt")
        seen.append(published(callback, root))
        found.append((seen, tree(root)))
    assert found[1] == found[0]
