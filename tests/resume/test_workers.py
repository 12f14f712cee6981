"""A loader's worker processes: they outlive signals that are meant for the run, and never the run itself."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import holdfast as pl
from tests.training.toys import trainer

CHILD = Path(__file__).with_name("worker_child.py")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
METHODS = ("fork", "spawn", "forkserver")


class Child:
    """`worker_child.py` as a process group of its own, as a shell or a scheduler starts a run."""

    def __init__(self, method: str, mode: str) -> None:
        command = [sys.executable, str(CHILD), method, mode]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
        self.workers: list[int] = []

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words, self.process.communicate()[1]
        if words[0] == "workers":
            self.workers = [int(word) for word in words[1:]]
        return words

    def signal_all(self) -> None:
        for number in SIGNALS:
            os.killpg(self.process.pid, number)

    def signal_all_until_next_line(self) -> None:
        while not select.select([self.process.stdout], [], [], 0.01)[0]:
            self.signal_all()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def wait_until_workers_are_gone(self) -> None:
        """Waits for as long as it takes; the test's own time limit is the limit."""
        for pid in self.workers:
            try:
                handle = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            select.select([handle], [], [])
            os.close(handle)


@pytest.fixture
def child() -> Iterator[Any]:
    started: list[Child] = []

    def start(method: str, mode: str) -> Child:
        started.append(Child(method, mode))
        return started[-1]

    yield start
    for one in started:
        for pid in (one.process.pid, *one.workers):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        one.process.communicate()


class TestSignalsForTheProcessGroup:
    """As of a terminal's Ctrl-C or a scheduler's SIGTERM, while workers start and while they read."""

    @pytest.mark.parametrize("method", METHODS)
    def test_workers_read_on(self, child: Any, method: str) -> None:
        run = child(method, "reads")
        assert run.line() == ["starting"]
        run.signal_all_until_next_line()
        assert run.line()[0] == "workers"
        run.signal_all()
        run.go_on()
        assert run.line() == ["read", "True", "True"], "every row came, and each signal reached the run"
        assert run.line() == ["left", "0"]
        ended = signal.SIGKILL if method == "fork" else signal.SIGTERM
        assert run.line() == ["another", str(-ended)], "other processes of the run's are not deaf"
        assert run.process.wait() == 0

    def test_of_validation_too(self) -> None:
        assert self.deaf(lambda model, data: trainer().fit(model, data, data)) == {
            "training_step": {True},
            "validation_step": {True},
        }

    def test_not_outside_of_fit(self) -> None:
        """Nothing is saved there at a signal: it ends the workers as it ends the process."""
        told = self.deaf(lambda model, data: trainer().validate(model, data, verbose=False))
        assert told == {"validation_step": {False}}

    def test_not_where_the_run_does_not_handle_signals(self) -> None:
        told = self.deaf(lambda model, data: trainer(stop_signals=()).fit(model, data))
        assert told == {"training_step": {False}}

    def test_not_in_another_thread(self) -> None:
        def train(model: Any, data: Any) -> None:
            thread = threading.Thread(target=lambda: trainer().fit(model, data))
            thread.start()
            thread.join()

        assert self.deaf(train) == {"training_step": {False}}

    def deaf(self, run: Any) -> dict[str, set[bool]]:
        """Whether the workers of each step ignored SIGTERM."""
        model = Told()
        run(model, DataLoader(Deaf(), batch_size=2, num_workers=1))
        return model.told


class Deaf(Dataset[int]):
    """Tells whether the process that reads a row ignores SIGTERM."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return int(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)


class Told(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.told: dict[str, set[bool]] = {}

    def tell(self, step: str, batch: torch.Tensor) -> None:
        self.told.setdefault(step, set()).update(bool(value) for value in batch.tolist())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.tell("training_step", batch)
        return self.weight * batch.float().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.tell("validation_step", batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestTheEnd:
    """A worker that ignores SIGTERM is not left behind."""

    def test_workers_end_when_the_run_was_killed(self, child: Any) -> None:
        self.killed(child("fork", "dies"))

    def test_workers_of_a_fork_server_end_when_the_run_was_killed(self, child: Any) -> None:
        """Under torch alone they and the server stay for ever."""
        self.killed(child("forkserver", "dies"))

    def killed(self, run: Child) -> None:
        run.line(), run.line()
        run.process.kill()
        run.process.wait()
        run.wait_until_workers_are_gone()

    def test_a_worker_that_hangs_is_killed_when_the_data_is_closed(self, child: Any) -> None:
        run = child("fork", "closes")
        run.line(), run.line()
        assert run.line() == ["left", "0"]
        assert run.process.wait() == 0

    def test_a_worker_that_hangs_does_not_keep_a_run_from_exiting(self, child: Any) -> None:
        run = child("fork", "leaves")
        run.line(), run.line()
        assert run.line() == ["leaving"]
        assert run.process.wait() == 0
        run.wait_until_workers_are_gone()
        assert run.process.stderr.read() == ""

    def test_a_worker_that_hangs_at_the_end_of_an_epoch_is_killed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
        alive: list[int] = []

        class Watched(Told):
            def on_train_epoch_end(self) -> None:
                alive.append(len(multiprocessing.active_children()))

        trainer(max_epochs=2).fit(Watched(), DataLoader(NeverDone(), batch_size=2, num_workers=1))
        assert alive == [0, 0]
        assert multiprocessing.active_children() == []


class NeverDone(Deaf):
    """Leaves a thread behind that keeps its process from ending."""

    def __getitem__(self, index: int) -> int:
        if index == 0:
            threading.Thread(target=threading.Event().wait).start()
        return index


class Dying(Deaf):
    def __getitem__(self, index: int) -> int:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return index


def test_a_worker_that_dies_is_an_error_as_ever() -> None:
    with pytest.raises(RuntimeError) as refused:
        trainer().fit(Told(), DataLoader(Dying(), batch_size=2, num_workers=1))
    # Which of torch's two ways of noticing comes first is a matter of chance.
    assert "DataLoader worker (pid" in str(refused.value)
    assert multiprocessing.active_children() == []


def greet(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.greeting = 10 + worker_id


class Greeted(Deaf):
    greeting = 0

    def __getitem__(self, index: int) -> int:
        return self.greeting + int(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize("stateful", [False, True])
def test_the_users_worker_init_fn_is_called_and_stays_the_loaders(stateful: bool) -> None:
    seen: list[float] = []

    class Seeing(Told):
        def tell(self, step: str, batch: torch.Tensor) -> None:
            seen.extend(batch.tolist())

    data: Any = DataLoader(Greeted(), batch_size=2, num_workers=1, worker_init_fn=greet)
    if stateful:
        made = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        data = made(Resuming(), batch_size=2, num_workers=1, worker_init_fn=greet)
    trainer().fit(Seeing(), data)
    assert seen == [11, 11, 11, 11]
    assert data.worker_init_fn is greet


class Resuming(Greeted):
    """Has a state, so that its loader is read as it is and not through a copy."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
