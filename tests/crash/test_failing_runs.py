"""A run whose disk or directory fails while it trains: what is lost, what is said, and how it goes on.

The run saves at every fourth step of 24; a file that was not saved because of a fault is missing, and nothing else is.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import disk
import pytest
import torch
from failing_run import SAVE_EVERY_N_STEPS, STEPS
from lives import Life

SAVES = range(SAVE_EVERY_N_STEPS, STEPS + 1, SAVE_EVERY_N_STEPS)
CALLS = ["create", "write", "fsync", "rename"]
# The save of step 8 has ended before the batch after the next, so that it is known where its error is raised.
IN_TIME = {"8": [["nothing"]]}


@pytest.fixture(params=[True, False], ids=["background", "foreground"])
def background(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def library() -> str:
    made = disk.library()
    if made is None:
        pytest.skip("no C compiler here")
    return made


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of the run that nothing happens to."""
    root = tmp_path_factory.mktemp("reference") / "run"
    run(root)
    return dict(torch.load(root / "final.pt"))


def run(root: Path, **options: Any) -> dict[str, Any]:
    """Train; returns what is to be known of it."""
    life = Life(root, "failing_run", **options).end()
    assert life.code == 0, life.log
    if "not_permitted" in life.facts[-1]:
        pytest.skip(f"no mounts of its own here: {life.facts[-1]['not_permitted']}")
    return {**life.facts[-1], "log": life.log}


def files(*steps: int) -> dict[str, int]:
    """The files of these steps, and last."""
    named = {f"epoch={(step - 1) // 8}-step={step}.ckpt": step for step in steps}
    return {**named, "last.ckpt": max(steps)} if steps else {}


def assert_goes_on(root: Path, reference: dict[str, Any], **options: Any) -> None:
    """By the same command the run ends as the one that nothing happened to."""
    said = run(root, **options)
    assert (said["failure"], said["step"]) == (None, STEPS), said
    assert_same_weights(root, reference)


def assert_same_weights(root: Path, reference: dict[str, Any]) -> None:
    weights = torch.load(root / "final.pt")
    assert [name for name in reference if not weights[name].equal(reference[name])] == []


@pytest.mark.parametrize("call", CALLS)
def test_it_ends_with_the_error_and_what_was_saved_stays(
    tmp_path: Path, reference: dict[str, Any], library: str, background: bool, call: str
) -> None:
    """Started again once the disk is well, the run goes on."""
    root, how = tmp_path / "run", {"background": background}
    said = run(root, preload=library, at={"6": [["refuse", call, errno.ENOSPC]], **IN_TIME}, checkpoint=how)
    failure = said["failure"]
    assert (failure["type"], failure["errno"]) == ("StorageError", errno.ENOSPC)
    assert failure["path"] == str(root / "checkpoints" / "epoch=0-step=8.ckpt")
    assert "commit.py" in failure["files"], "the traceback leads to where it was met"
    assert said["step"] in ((8, 9) if background else (8,)), "at a safe point soon after it was met"
    assert said["left"] == files(4)
    assert said["published"] == [str(root / "checkpoints" / name) for name in files(4)]
    assert_goes_on(root, reference, checkpoint=how)


def test_a_directory_that_cannot_be_made_certain(
    tmp_path: Path, reference: dict[str, Any], library: str, background: bool
) -> None:
    """The file has its name but may not survive a power failure: that is an error, and the file stays."""
    root, how = tmp_path / "run", {"background": background}
    said = run(
        root, preload=library, at={"6": [["refuse", "dirfsync", errno.EIO]], **IN_TIME}, checkpoint=how
    )
    path = root / "checkpoints" / "epoch=0-step=8.ckpt"
    assert said["failure"]["message"] == (
        f"Could not fsync the directory of {path}: Input/output error. "
        "The new file is in place, but may not survive a power failure. "
        "The disk reports errors: look at the system's log before relying on this file system."
    )
    assert said["left"] == {**files(4), path.name: 8}
    assert said["published"] == [str(root / "checkpoints" / name) for name in files(4)]
    assert_goes_on(root, reference, checkpoint=how)


@pytest.mark.parametrize("call", ["create", "write", "rename"])
def test_in_the_last_save_of_all_the_fit_ends_with_the_error(
    tmp_path: Path, reference: dict[str, Any], library: str, background: bool, call: str
) -> None:
    root, how = tmp_path / "run", {"background": background}
    events = {"22": [["refuse", call, errno.EIO]]}
    said = run(root, preload=library, at=events, checkpoint=how)
    assert (said["failure"]["errno"], said["step"]) == (errno.EIO, STEPS)
    assert said["left"] == files(*SAVES[:-1])
    assert_goes_on(root, reference, checkpoint=how)


@pytest.mark.parametrize("call", CALLS)
def test_told_to_warn_it_trains_on_and_saves_again_once_the_disk_is_well(
    tmp_path: Path, reference: dict[str, Any], library: str, background: bool, call: str
) -> None:
    root, how = tmp_path / "run", {"background": background, "on_error": "warn"}
    events = {"6": [["refuse", call, errno.EIO]], "14": [["accept"]]}
    said = run(root, preload=library, at=events, checkpoint=how)
    assert (said["failure"], said["step"]) == (None, STEPS)
    told = [text for text in said["warnings"] if "Input/output error" in text]
    for step in (8, 12):
        name = str(root / "checkpoints" / f"epoch={(step - 1) // 8}-step={step}.ckpt")
        assert sum(name in text for text in told) == 1, said["warnings"]
    assert len(told) == 2
    assert said["left"] == files(4, 16, 20, 24)
    assert_same_weights(root, reference)


@pytest.mark.parametrize("call", CALLS)
def test_told_to_retry_it_writes_the_file_anew(
    tmp_path: Path, reference: dict[str, Any], library: str, background: bool, call: str
) -> None:
    root, how = tmp_path / "run", {"background": background, "on_error": "retry"}
    events = {"6": [["refuse", call, errno.EIO, 0, 2]]}
    said = run(root, preload=library, at=events, checkpoint=how)
    assert (said["failure"], said["step"]) == (None, STEPS)
    assert said["left"] == files(*SAVES)
    assert_same_weights(root, reference)


def test_retried_for_nothing_it_ends_with_the_error(
    tmp_path: Path, reference: dict[str, Any], library: str, background: bool
) -> None:
    root, how = tmp_path / "run", {"background": background, "on_error": "retry"}
    said = run(root, preload=library, at={"6": [["refuse", "fsync", errno.EIO]], **IN_TIME}, checkpoint=how)
    assert (said["failure"]["type"], said["failure"]["errno"]) == ("StorageError", errno.EIO)
    assert said["left"] == files(4)
    assert_goes_on(root, reference, checkpoint=how)


def test_a_full_disk_and_then_room(tmp_path: Path, reference: dict[str, Any], background: bool) -> None:
    """The file system is full for real; as soon as there is room the files are saved again."""
    how = {"background": background, "on_error": "warn"}
    events = {"6": [["fill"]], "14": [["make_room"]]}
    said = run(tmp_path / "run", mount="size=4m", at=events, checkpoint=how)
    assert (said["failure"], said["step"]) == (None, STEPS)
    told = [text for text in said["warnings"] if "No space left on device" in text]
    assert len(told) == 2
    for text in told:
        assert re.search(r"[\d,]+ bytes are needed, [\d,]+ bytes are free: make room", text), text
    assert said["left"] == files(4, 16, 20, 24)
    assert_same_weights(tmp_path / "run", reference)


@pytest.mark.parametrize("event", ["delete", "rename"])
def test_a_directory_that_disappears_between_saves_is_made_again(
    tmp_path: Path, reference: dict[str, Any], background: bool, event: str
) -> None:
    """What was in it is where its owner put it; what is saved from then on is there."""
    root = tmp_path / "run"
    said = run(root, at={"6": [[event]]}, checkpoint={"background": background})
    assert (said["failure"], said["step"]) == (None, STEPS)
    assert said["left"] == files(*SAVES[1:])
    assert sorted(path.name for path in root.glob("elsewhere/*")) == (
        sorted(files(4)) if event == "rename" else []
    )
    assert_same_weights(root, reference)


def test_a_directory_that_disappears_during_a_save(
    tmp_path: Path, reference: dict[str, Any], background: bool
) -> None:
    """That save fails; where it is retried, the directory is made again."""
    root, how = tmp_path / "run", {"background": background}
    events = {"6": [["delete_when_written"]], **IN_TIME}
    said = run(root, at=events, checkpoint=how)
    path = root / "checkpoints" / "epoch=0-step=8.ckpt"
    assert said["failure"]["message"] == (
        f"Could not rename a file to {path}: No such file or directory. It is safe to try again."
    )
    assert_goes_on(root, reference, checkpoint=how)

    other = tmp_path / "other"
    said = run(other, at=events, checkpoint={**how, "on_error": "retry"})
    assert (said["failure"], said["left"]) == (None, files(*SAVES[1:]))
    assert_same_weights(other, reference)


def test_a_directory_that_becomes_a_file(tmp_path: Path, reference: dict[str, Any], background: bool) -> None:
    """It is not touched, and the error names it."""
    root, how = tmp_path / "run", {"background": background}
    said = run(root, at={"6": [["replace_by_file"]], **IN_TIME}, checkpoint=how)
    directory = root / "checkpoints"
    assert said["failure"]["message"] == (
        f"Could not create the directory {directory}: Not a directory. "
        "What was there before is untouched. Choose another directory."
    )
    assert directory.read_text() == "in the way"
    directory.unlink()
    assert_goes_on(root, reference, checkpoint=how)
