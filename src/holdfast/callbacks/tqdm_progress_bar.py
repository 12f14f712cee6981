"""The progress bar drawn with tqdm, for code that derives from Lightning's."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from holdfast.callbacks.lines_above import LinesAbove
from holdfast.callbacks.progress_bar import ProgressBar, known
from holdfast.errors import ConfigError
from holdfast.utilities.types import STEP_OUTPUT

if TYPE_CHECKING:
    from holdfast.training.module import LightningModule
    from holdfast.training.trainer import Trainer


class _Bar:
    """A bar that is there from the start of what it shows; asking for it before is an error."""

    def __init__(self, promise: str) -> None:
        self.__doc__ = promise

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: TQDMProgressBar | None, kind: type) -> Any:
        if owner is None:
            return self
        bar = getattr(owner, f"_{self.name}")
        if bar is None:
            raise TypeError(
                f"{kind.__name__}.{self.name} is not there yet: nothing that it would show has begun."
            )
        return bar

    def __set__(self, owner: TQDMProgressBar, bar: Any) -> None:
        setattr(owner, f"_{self.name}", bar)


class TQDMProgressBar(ProgressBar):
    """A tqdm bar for training, one below it for validation, one for testing and one for prediction.

    A bar's ``n`` is the number of batches done, ``total`` that of the loader it is at (None when nobody
    knows). It moves every ``refresh_rate`` batches and at a loader's end. It is drawn when it moves, but at
    most every ``mininterval`` seconds (tqdm's own setting): metrics are looked at only then. Override
    ``init_train_tqdm`` and its like to make other bars, `get_metrics` to change what stands behind them.

    Args:
        refresh_rate: Batches from one move to the next; 0 shows nothing. The environment variable
            ``TQDM_MINITERS`` overrides any number but 0.
        process_position: How many pairs of lines to leave free above, for several runs in one terminal.
        leave: Leave a finished line behind for every epoch.

    Raises:
        ConfigError: tqdm is not installed.
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    train_progress_bar = _Bar("The bar of the training epoch.")
    val_progress_bar = _Bar("The bar of validation, the sanity check's included.")
    test_progress_bar = _Bar("The bar of testing.")
    predict_progress_bar = _Bar("The bar of prediction.")

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__()
        if importlib.util.find_spec("tqdm") is None:
            raise ConfigError(
                "TQDMProgressBar draws with tqdm, which is not installed: pip install tqdm, or use "
                "RichProgressBar."
            )
        self._refresh_rate = int(os.environ.get("TQDM_MINITERS", refresh_rate)) if refresh_rate else 0
        self._process_position = process_position
        self._leave = leave
        self._enabled = self._refresh_rate > 0
        self._train_progress_bar: Any
        self._val_progress_bar: Any
        self._test_progress_bar: Any
        self._predict_progress_bar: Any
        self._done = 0  # batches of the epoch
        self._evaluated = 0  # batches of the loader that is being read
        self._in_epoch = False
        self._draw_s = 0.0  # when it is time to draw again
        self._no_bars()

    @property
    def refresh_rate(self) -> int:
        """Batches from one move to the next; 0 shows nothing."""
        return self._refresh_rate

    @property
    def process_position(self) -> int:
        """How many pairs of lines are left free above."""
        return self._process_position

    def enable(self) -> None:
        """Show everything again, unless ``refresh_rate`` is 0."""
        self._enabled = self._refresh_rate > 0

    @property
    def lines_drawn(self) -> int:
        """The line of the first bar, where tqdm leaves the cursor; 0 while there is none."""
        return int(bool(self._open_bars()) and self._lines_above.stdout.isatty())

    # -- to override -----------------------------------------------------------------------------------------

    def init_sanity_tqdm(self) -> Any:
        """Make the bar of the sanity check."""
        return self._new_bar(self.sanity_check_description, leave=False)

    def init_train_tqdm(self) -> Any:
        """Make the bar of training."""
        return self._new_bar(self.train_description, leave=True)

    def init_validation_tqdm(self) -> Any:
        """Make the bar of validation: below the training bar, or alone in ``trainer.validate()``."""
        alone = self.trainer.state.fn == "validate"
        return self._new_bar(self.validation_description, leave=alone, below=not alone)

    def init_test_tqdm(self) -> Any:
        """Make the bar of testing."""
        return self._new_bar(self.test_description, leave=True)

    def init_predict_tqdm(self) -> Any:
        """Make the bar of prediction."""
        return self._new_bar(self.predict_description, leave=True)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        with self._out_of_the_way():
            print(*args, **kwargs)

    # -- fit -------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the sanity check's bar; the training bar is there, but shows nothing."""
        self._begin()
        self.val_progress_bar = self.init_sanity_tqdm()
        self.train_progress_bar = _tqdm()(disable=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the training bar."""
        self._begin()
        self._in_epoch = False
        self.train_progress_bar = self.init_train_tqdm()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the training bar to the epoch's start."""
        if self._leave and self.train_progress_bar.disable:
            self.train_progress_bar = self.init_train_tqdm()
        self._in_epoch, self._done = True, 0
        _restart(self.train_progress_bar, f"Epoch {trainer.current_epoch}", self.total_train_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, if it is time."""
        self._done = done = batch_idx + 1
        if not self._enabled:
            return
        bar = self._train_progress_bar
        if not self._in_epoch:
            self._enter_epoch(trainer, done)
        if (done % self._refresh_rate == 0 or done == bar.total) and self._move(bar, done):
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.refresh()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the epoch's end, with the values that came last."""
        bar = self.train_progress_bar
        if not bar.disable:
            bar.n = max(bar.n, self._done)
            bar.set_postfix(self.get_metrics(trainer, pl_module))
        if self._leave:
            bar.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self.train_progress_bar.close()

    # -- validation, test, predict ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar of validation."""
        self._begin()
        if not trainer.sanity_checking:
            self.val_progress_bar = self.init_validation_tqdm()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar."""
        self._begin()
        self.test_progress_bar = self.init_test_tqdm()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar."""
        self._begin()
        self.predict_progress_bar = self.init_predict_tqdm()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Begin anew with every loader."""
        if self.has_dataloader_changed(dataloader_idx):
            name, total = self._loader(trainer)
            _restart(self._evaluation_bar(trainer), f"{name} DataLoader {dataloader_idx}", total)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar, if it is time."""
        self._evaluated = done = batch_idx + 1
        bar = self._evaluation_bar(trainer)
        if not self._enabled or (done % self._refresh_rate and done != bar.total):
            return
        if self._move(bar, done):
            bar.refresh()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away inside of fit, and show the new values behind the training bar."""
        self._end_evaluation(self.val_progress_bar)
        if trainer.state.fn == "fit" and self._train_progress_bar is not None:
            self._train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self._end_evaluation(self._evaluation_bar(trainer))

    on_predict_end = on_test_end

    # -- the end ---------------------------------------------------------------------------------------------

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._shut()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._shut()

    def __getstate__(self) -> dict[str, Any]:
        # Bars belong to one terminal; a copy begins without.
        state = {name: value for name, value in self.__dict__.items() if name != "_lines_above"}
        return {**state, **dict.fromkeys(_STORED)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._no_bars()

    def _no_bars(self) -> None:
        for name in _STORED:
            setattr(self, name, None)
        self._making_room = False
        self._lines_above = LinesAbove(self._out_of_the_way, self._others_draw)

    def _new_bar(self, name: str, *, leave: bool, below: bool = False) -> Any:
        return _tqdm()(
            desc=name,
            file=self._lines_above.stdout,
            leave=leave,
            position=2 * self._process_position + below,
            disable=self.is_disabled,
            dynamic_ncols=True,
            bar_format=self.BAR_FORMAT,
        )

    def _begin(self) -> None:
        if self._enabled:
            self._lines_above.start()

    def _enter_epoch(self, trainer: Trainer, done: int) -> None:
        """A run that goes on inside an epoch comes to its first batch's end without the epoch's start."""
        bar, self._in_epoch = self._train_progress_bar, True
        if bar.total is None:
            bar.total = known(self._batches_of_epoch(done))
            bar.initial = done - 1  # the pace is that of the batches since
            bar.set_description(f"Epoch {trainer.current_epoch}", refresh=False)

    def _move(self, bar: Any, done: int) -> bool:
        """Set the bar to ``done`` batches; tells whether it is time to draw."""
        if bar.disable:
            return False
        bar.n = done
        now_s = time.monotonic()
        if now_s < self._draw_s and done != bar.total:
            return False
        self._draw_s = now_s + bar.mininterval
        return True

    def _evaluation_bar(self, trainer: Trainer) -> Any:
        fn = trainer.state.fn
        if fn == "test":
            return self.test_progress_bar
        return self.predict_progress_bar if fn == "predict" else self.val_progress_bar

    def _loader(self, trainer: Trainer) -> tuple[str, int | float]:
        """What is being done, and how many batches the loader has that it is at."""
        fn = trainer.state.fn
        if fn == "test":
            return self.test_description, self.total_test_batches_current_dataloader
        if fn == "predict":
            return self.predict_description, self.total_predict_batches_current_dataloader
        name = self.sanity_check_description if trainer.sanity_checking else self.validation_description
        return name, self.total_val_batches_current_dataloader

    def _end_evaluation(self, bar: Any) -> None:
        self.reset_dataloader_idx_tracker()
        if not bar.disable:
            bar.n = max(bar.n, self._evaluated)
        self._evaluated = 0
        bar.close()

    def _open_bars(self) -> list[Any]:
        bars = [getattr(self, name) for name in _STORED]
        return [bar for bar in bars if bar is not None and not bar.disable]

    def _others_draw(self) -> bool:
        return len(_tqdm()._instances) > len(self._open_bars())

    @contextlib.contextmanager
    def _out_of_the_way(self) -> Iterator[None]:
        if self._making_room:
            yield
            return
        self._making_room, bars = True, self._open_bars()
        for bar in reversed(bars):
            bar.clear()
        try:
            yield
        finally:
            self._making_room = False
            for bar in bars:
                bar.refresh()

    def _shut(self) -> None:
        for bar in reversed(self._open_bars()):
            bar.close()
        self._lines_above.stop()


_STORED = ("_train_progress_bar", "_val_progress_bar", "_test_progress_bar", "_predict_progress_bar")


def _tqdm() -> Any:
    from holdfast.callbacks.progress.tqdm_progress import Tqdm

    return Tqdm


def _restart(bar: Any, name: str, total: int | float) -> None:
    bar.total, bar.initial = known(total), 0
    bar.set_description(name, refresh=False)
    bar.reset()  # draws it
