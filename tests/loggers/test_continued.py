"""Which logs a resumed run goes on with, where the user names both the checkpoint and the directory.

The run's own logs end as those of a run that never stopped; another run's are never touched, not even where
they lie in the same directory and hold the same rows.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import holdfast as pl
from holdfast.callbacks import Callback, ModelCheckpoint
from holdfast.loggers import CSVLogger, TensorBoardLogger
from tests.loggers.events import series
from tests.training.toys import Toy, rows, trainer


class Cut(Exception):
    """Stands for whatever ends a process."""


class CutsAt(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step:
            # Whatever was logged has reached the disk, and no checkpoint counts on it.
            for logger in trainer.loggers:
                logger.save()
            raise Cut


class Logs(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        if self.trainer.global_step >= 5:
            self.log("late", 1.0)
        return loss

    def on_train_end(self) -> None:
        for logger in self.loggers:
            logger.log_metrics({"ended": 1.0}, step=self.trainer.global_step)


def fit(
    root: Path,
    ckpt_path: Any = None,
    *,
    version: int | str | None = 0,
    name: str | None = "logs",
    cut_at: int | None = None,
    dirpath: Path | None = None,
    seed: int = 1,
    callbacks: tuple[Callback, ...] = (),
) -> pl.Trainer:
    """Nine steps, each logged, with a checkpoint at every second one; TensorBoard's files and a CSV file."""
    pl.seed_everything(seed, verbose=False)
    made = trainer(
        default_root_dir=root,
        max_epochs=3,
        log_every_n_steps=1,
        logger=[TensorBoardLogger(root, name, version), CSVLogger(root, name, version)],
        callbacks=[
            CutsAt(cut_at),
            *callbacks,
            ModelCheckpoint(dirpath, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True),
            ModelCheckpoint(dirpath, "end-{step}", save_top_k=-1),
        ],
    )
    made.fit(Logs(), rows(), ckpt_path=ckpt_path)
    return made


def cut(root: Path, **arguments: Any) -> None:
    with pytest.raises(Cut):
        fit(root, **arguments)


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Of each file: its bytes, and when it was written."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def logged(directory: Path) -> Any:
    return (directory / "metrics.csv").read_text(), series(directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The logs of the run that never stopped."""
    root = tmp_path_factory.mktemp("whole")
    fit(root)
    return logged(root / "logs" / "version_0")


class TestItsOwn:
    @pytest.mark.parametrize("step", [2, 4, 6])
    def test_a_path_in_the_version_named_by_hand(self, step: int, whole: Any, tmp_path: Path) -> None:
        cut(tmp_path, cut_at=7)
        directory = tmp_path / "logs" / "version_0"
        assert len((directory / "metrics.csv").read_text().splitlines()) == 1 + 7 + 2
        fit(tmp_path, directory / "checkpoints" / f"step={step}.ckpt")
        assert logged(directory) == whole
        assert sorted(path.name for path in directory.glob("metrics*")) == ["metrics.csv"]

    def test_last(self, whole: Any, tmp_path: Path) -> None:
        cut(tmp_path, cut_at=7)
        fit(tmp_path, "last")
        assert logged(tmp_path / "logs" / "version_0") == whole

    @pytest.mark.parametrize("name", ["mine", None])
    def test_a_version_that_is_a_word(self, name: str | None, whole: Any, tmp_path: Path) -> None:
        cut(tmp_path, cut_at=7, name=name, version="v")
        directory = tmp_path / (name or "") / "v"
        fit(tmp_path, directory / "checkpoints" / "step=4.ckpt", name=name, version="v")
        assert logged(directory) == whole

    def test_checkpoints_that_lie_elsewhere(self, whole: Any, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        cut(tmp_path, cut_at=7, dirpath=kept)
        fit(tmp_path, kept / "step=4.ckpt", dirpath=kept)
        assert logged(tmp_path / "logs" / "version_0") == whole

    def test_a_version_that_was_moved(self, whole: Any, tmp_path: Path) -> None:
        cut(tmp_path, cut_at=7)
        directory = tmp_path / "logs" / "version_5"
        os.rename(tmp_path / "logs" / "version_0", directory)
        fit(tmp_path, directory / "checkpoints" / "step=4.ckpt", version=5)
        assert logged(directory) == whole

    def test_a_root_that_was_moved_with_its_checkpoints(self, whole: Any, tmp_path: Path) -> None:
        before, now = tmp_path / "before", tmp_path / "now"
        cut(before, cut_at=7, dirpath=before / "kept")
        os.rename(before, now)
        fit(now, now / "kept" / "step=4.ckpt", dirpath=now / "kept")
        assert logged(now / "logs" / "version_0") == whole

    def test_again_and_again(self, whole: Any, tmp_path: Path) -> None:
        directory = tmp_path / "logs" / "version_0"
        cut(tmp_path, cut_at=3)
        for step, cut_at in ((2, 7), (4, 5), (2, 8)):
            cut(tmp_path, ckpt_path=directory / "checkpoints" / f"step={step}.ckpt", cut_at=cut_at)
        fit(tmp_path, directory / "checkpoints" / "step=6.ckpt")
        assert logged(directory) == whole


class TestAnotherRuns:
    def test_a_run_that_was_begun_anew_in_the_same_directory(self, tmp_path: Path) -> None:
        """The checkpoint is the first run's, the newest logs are the second one's."""
        directory = tmp_path / "logs" / "version_0"
        cut(tmp_path, cut_at=7)
        mine = contents(directory)
        cut(tmp_path, cut_at=7, seed=2)
        theirs = {name: one for name, one in contents(directory).items() if name not in mine}
        (events,) = (name for name in theirs if "tfevents" in name)
        rows = (directory / "metrics.csv").read_bytes()
        fit(tmp_path, directory / "checkpoints" / "step=4.ckpt")
        assert contents(directory)[events] == theirs[events]
        assert (directory / "metrics-v2.csv").read_bytes() == rows
        assert contents(directory)["metrics-v1.csv"] == mine["metrics.csv"]

    def test_the_very_same_run_begun_anew(self, tmp_path: Path) -> None:
        """Its rows are the same, so whose the file is cannot be told: it is kept."""
        directory = tmp_path / "logs" / "version_0"
        cut(tmp_path, cut_at=7)
        cut(tmp_path, cut_at=7)
        rows = (directory / "metrics.csv").read_bytes()
        assert rows == (directory / "metrics-v1.csv").read_bytes()
        fit(tmp_path, directory / "checkpoints" / "step=4.ckpt")
        assert (
            rows == (directory / "metrics-v1.csv").read_bytes() == (directory / "metrics-v2.csv").read_bytes()
        )

    @pytest.mark.parametrize(("root", "version"), [("run", 1), ("other", 0)])
    def test_the_very_same_run_in_another_directory(self, root: str, version: int, tmp_path: Path) -> None:
        cut(tmp_path / "run", cut_at=7)
        cut(tmp_path / root, cut_at=7, version=version)
        own = tmp_path / "run" / "logs" / "version_0"
        other = tmp_path / root / "logs" / f"version_{version}"
        mine, theirs = contents(own), contents(other)
        fit(tmp_path / root, own / "checkpoints" / "step=4.ckpt", version=version)
        now = contents(other)
        assert now["metrics-v1.csv"] == theirs["metrics.csv"]
        assert all(now[name] == one for name, one in theirs.items() if "tfevents" in name)
        assert contents(own) == mine

    def test_a_copy_of_the_checkpoint_beside_another_runs_logs(self, tmp_path: Path) -> None:
        cut(tmp_path, cut_at=7)
        cut(tmp_path, cut_at=7, version=1, seed=2)
        theirs = tmp_path / "logs" / "version_1"
        copied = theirs / "checkpoints" / "copied.ckpt"
        shutil.copy(tmp_path / "logs" / "version_0" / "checkpoints" / "step=4.ckpt", copied)
        before = contents(theirs)
        fit(tmp_path, copied, version=1)
        now = contents(theirs)
        assert now["metrics-v1.csv"] == before["metrics.csv"]
        assert all(now[name] == one for name, one in before.items() if "tfevents" in name)

    def test_a_version_that_nobody_named_is_a_new_one(self, tmp_path: Path) -> None:
        cut(tmp_path, cut_at=7)
        directory = tmp_path / "logs" / "version_0"
        before = contents(directory)
        resumed = fit(tmp_path, directory / "checkpoints" / "step=4.ckpt", version=None)
        assert contents(directory) == before
        assert [os.path.basename(one.log_dir or "") for one in resumed.loggers] == ["version_1", "version_2"]

    def test_a_run_that_was_begun_anew_when_another_goes_on_by_itself(self, tmp_path: Path) -> None:
        directory = tmp_path / "logs" / "version_0"
        cut(tmp_path, cut_at=7)
        mine = contents(directory)
        cut(tmp_path, cut_at=1, seed=2)  # before its first checkpoint
        (events,) = (name for name in contents(directory) if "tfevents" in name and name not in mine)
        theirs = contents(directory)
        with pytest.warns(
            UserWarning, match="it is another run's, or was changed, and is kept as metrics-v2"
        ):
            fit(tmp_path, "auto")
        now = contents(directory)
        assert now[events] == theirs[events]
        assert now["metrics-v2.csv"] == theirs["metrics.csv"]

    def test_a_changed_file_is_kept_when_a_run_goes_on_by_itself(self, tmp_path: Path) -> None:
        directory = tmp_path / "logs" / "version_0"
        cut(tmp_path, cut_at=7)
        path = directory / "metrics.csv"
        path.write_text(path.read_text().replace("\n0,,", "\n10,,", 1))
        changed = path.read_bytes()
        assert b"\n10," in changed
        with pytest.warns(UserWarning, match="another run's") as warned:
            fit(tmp_path, "auto")
        assert str(warned[0].message) == (
            f"{path} does not begin with the 8 rows that were logged before the checkpoint: it is another "
            "run's, or was changed, and is kept as metrics-v1.csv. A new file begins with what is logged from "
            "here on."
        )
        assert (directory / "metrics-v1.csv").read_bytes() == changed


class TestFinished:
    """Started again with the same command, a finished run leaves every file as it is."""

    @pytest.mark.parametrize("ckpt_path", ["auto", "last", "logs/version_0/checkpoints/end-step=9.ckpt"])
    @pytest.mark.parametrize("version", [0, None])
    def test_no_file_is_touched(self, ckpt_path: str, version: int | None, tmp_path: Path) -> None:
        fit(tmp_path, version=version)
        before = contents(tmp_path)
        assert (
            "ended" in (tmp_path / "logs" / f"version_{0 if version == 0 else 1}" / "metrics.csv").read_text()
        )
        path = tmp_path / ckpt_path if "/" in ckpt_path else ckpt_path
        for _ in range(2):
            again = fit(tmp_path, path, version=version)
            assert again.global_step == 9
            assert contents(tmp_path) == before

    def test_what_a_hook_logs_all_the_same_is_there_once(self, tmp_path: Path) -> None:
        class Says(Callback):
            def on_fit_end(self, trainer: Any, module: Any) -> None:
                trainer.loggers[1].log_metrics({"said": 1.0}, step=9)

        for _ in range(3):
            fit(tmp_path, "auto", callbacks=(Says(),))
        table = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
        header, *lines = table.splitlines()
        said = header.split(",").index("said")
        assert [line.split(",")[said] for line in lines].count("1.0") == 1

    def test_a_hook_that_raises_the_limit_trains_on_in_the_same_logs(self, tmp_path: Path) -> None:
        class Longer(Callback):
            def on_fit_start(self, trainer: Any, module: Any) -> None:
                trainer.fit_loop.max_epochs = 4

        fit(tmp_path)
        again = fit(tmp_path, "auto", callbacks=(Longer(),))
        table = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
        assert again.global_step == 12
        assert len(table.splitlines()) == 1 + 12 + 4 + 1
