"""What may be in the state: it comes back exactly, all of it or nothing, and the loop goes on bit for bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from holdfast.checkpoint import stateful
from holdfast.checkpoint.load import load
from holdfast.checkpointer import Checkpointer
from holdfast.errors import CheckpointIncompatible, StorageError


def save(directory: Path, state: dict[str, Any], step: int = 1, **arguments: Any) -> None:
    with Checkpointer(directory, **arguments) as checkpointer:
        checkpointer.save(step, state, force=True)


def refused(directory: Path, state: dict[str, Any]) -> list[str]:
    """The lines of the error that restoring gives."""
    with pytest.raises(CheckpointIncompatible) as caught:
        Checkpointer(directory).restore(state)
    return str(caught.value).splitlines()


def bits(value: Any) -> Any:
    """A nested value that is equal if and only if every tensor in it is the same bit for bit."""
    if isinstance(value, torch.Tensor):
        return (
            value.dtype,
            tuple(value.shape),
            bytes(value.detach().contiguous().flatten().view(torch.uint8).tolist()),
        )
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(one) for one in value]
    return repr(value)


# -- a resumed loop is the loop that never stopped ---------------------------------------------------------------


class Training:
    """A loop with everything in it that a loop has: two networks, an average, schedulers, a scaler, noise."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)
        self.model = nn.Sequential(
            nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 1)
        )
        self.critic = nn.Linear(4, 1, dtype=torch.bfloat16)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.optimizers = [
            torch.optim.AdamW(self.model.parameters(), lr=0.01, amsgrad=True),
            torch.optim.NAdam(self.critic.parameters(), lr=0.01),
        ]
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizers[0], 0.1, total_steps=100)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizers[1], patience=1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.rows = torch.Generator().manual_seed(5)
        self.noise = numpy.random.default_rng(6)
        self.dice = random.Random(7)
        self.running = torch.zeros(3)
        self.losses: list[float] = []
        self.state: dict[str, Any] = {
            "networks": {"model": self.model, "critic": self.critic},
            "average": self.average,
            "optimizers": self.optimizers,
            "schedulers": (self.scheduler, self.plateau),
            "scaler": self.scaler,
            "generators": [self.rows, self.noise, self.dice],
            "running": self.running,
            "losses": self.losses,
            "best": None,
        }

    def step(self) -> None:
        rows = torch.randn(8, 4, generator=self.rows) * float(self.noise.normal()) + self.dice.random()
        rows = rows + random.random() + float(numpy.random.normal())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.model(rows).square().mean() + self.critic(rows.bfloat16()).float().square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizers[0])
        self.optimizers[1].step()
        self.scaler.update()
        self.scheduler.step()
        self.plateau.step(loss.item())
        self.average.update_parameters(self.model)
        self.running += rows.mean()
        self.losses.append(loss.item())
        best = self.state["best"]
        self.state["best"] = loss.item() if best is None else min(best, loss.item())

    def outcome(self) -> Any:
        live = [
            self.model,
            self.critic,
            self.average,
            *self.optimizers,
            self.scheduler,
            self.plateau,
            self.scaler,
        ]
        return bits(
            [
                [one.state_dict() for one in live],
                [
                    self.running,
                    self.losses,
                    self.state["best"],
                    torch.rand(1),
                    random.random(),
                    numpy.random.rand(),
                ],
                [torch.rand(1, generator=self.rows), float(self.noise.normal()), self.dice.random()],
            ]
        )


def run(training: Training, first: int, last: int, checkpointer: Checkpointer | None = None) -> None:
    for step in range(first + 1, last + 1):
        training.step()
        if checkpointer is not None:
            checkpointer.save(step, training.state)


@pytest.mark.parametrize("background", [True, False])
def test_a_resumed_loop_goes_on_bit_for_bit(tmp_path: Path, background: bool) -> None:
    never_stopped = Training()
    run(never_stopped, 0, 20)
    expected = never_stopped.outcome()
    with Checkpointer(tmp_path, every=4, background=background) as checkpointer:
        run(Training(), 0, 10, checkpointer)  # two steps beyond the last checkpoint
    for first, last in ((8, 14), (12, 20)):
        training = Training()
        with Checkpointer(tmp_path, every=4, background=background) as checkpointer:
            assert checkpointer.restore(training.state) == first
            assert training.state["losses"] is training.losses
            run(training, first, last, checkpointer)
    assert training.outcome() == expected


def test_saving_changes_nothing_in_the_run(tmp_path: Path) -> None:
    without = Training()
    run(without, 0, 6)
    expected = without.outcome()
    saving = Training()
    with Checkpointer(tmp_path) as checkpointer:
        run(saving, 0, 6, checkpointer)
    assert saving.outcome() == expected


def test_without_rng_the_generators_are_left_alone(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    save(tmp_path / "without", {"model": model}, rng=False)
    save(tmp_path / "with", {"model": model})
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Checkpointer(tmp_path / "with", rng=False).restore({"model": model})
    assert torch.rand(1).equal(expected)
    with pytest.warns(UserWarning, match="the generators") as caught:
        Checkpointer(tmp_path / "without").restore({"model": model})
    assert str(caught[0].message) == (
        "Not restored from step=00000001.ckpt, and as it was before: the generators (saved with rng=False)."
    )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
def test_a_stateful_loader_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    """It shuffles by a generator of its own, seeded for each epoch: only the model draws from the global one."""
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    order, model = torch.Generator(), nn.Dropout()

    def made() -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        loader = loaders.StatefulDataLoader(list(range(20)), batch_size=2, shuffle=True, generator=order)
        return loader, {"loader": loader, "model": model}

    def batches(loader: Any, epoch: int) -> Any:
        order.manual_seed(epoch)
        for batch in loader:
            yield batch.tolist(), model(torch.ones(4)).tolist()

    loader, _ = made()
    whole = [*batches(loader, 0), *batches(loader, 1), *batches(loader, 2)]
    loader, state = made()
    seen = list(batches(loader, 0))
    with Checkpointer(tmp_path) as checkpointer:
        for step, one in enumerate(batches(loader, 1), 11):
            seen.append(one)
            checkpointer.save(step, state)
            if step == 14:
                break
    loader, state = made()
    assert Checkpointer(tmp_path).restore(state) == 14
    seen += [*batches(loader, 1), *batches(loader, 2)]
    assert seen == whole


def test_what_torchmetrics_has_gathered_comes_back(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    def made() -> dict[str, Any]:
        mean = torchmetrics.MeanMetric()
        model = nn.ModuleDict({"accuracy": torchmetrics.MetricCollection([torchmetrics.MaxMetric()])})
        return {"mean": mean, "model": model}

    state = made()
    state["mean"].update(torch.tensor([1.0, 2.0]))
    state["model"]["accuracy"].update(torch.tensor(7.0))
    save(tmp_path, state)
    state["mean"].update(torch.tensor(100.0))
    other = made()
    Checkpointer(tmp_path).restore(other)
    assert other["mean"].compute() == 1.5
    assert other["model"]["accuracy"].compute()["MaxMetric"] == 7
    other["mean"].update(torch.tensor(3.0))
    assert other["mean"].compute() == 2


# -- names and places --------------------------------------------------------------------------------------------


def test_restored_into_the_live_objects_themselves(tmp_path: Path) -> None:
    tensor, inner, listed = torch.arange(3.0), {"a": 1}, [1, 2]
    state: dict[str, Any] = {"tensor": tensor, "inner": inner, "listed": listed, "count": 3, "name": "x"}
    save(tmp_path, state)
    tensor.zero_(), inner.clear(), listed.append(3)
    state["count"] = 0
    del state["name"]
    Checkpointer(tmp_path).restore(state)
    assert state == {"tensor": tensor, "inner": inner, "listed": listed, "count": 3, "name": "x"}
    assert (tensor.tolist(), inner, listed) == ([0, 1, 2], {"a": 1}, [1, 2])
    empty: dict[str, Any] = {"tensor": None, "inner": {}, "listed": [], "count": 0}
    Checkpointer(tmp_path).restore(empty)
    assert empty["tensor"].tolist() == [0, 1, 2]


def test_a_dict_that_training_fills_is_empty_in_a_new_process(tmp_path: Path) -> None:
    save(tmp_path, {"averages": {"w": torch.ones(2), "n": 3}})
    averages: dict[str, Any] = {}
    Checkpointer(tmp_path).restore({"averages": averages})
    assert averages["w"].tolist() == [1, 1]
    assert averages["n"] == 3


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("before", [lambda m: m, compiled, nn.DataParallel, Wrapped])
@pytest.mark.parametrize("after", [lambda m: m, compiled, nn.DataParallel, Wrapped])
def test_wrappers_make_no_difference(
    tmp_path: Path, before: Callable[[nn.Module], nn.Module], after: Callable[[nn.Module], nn.Module]
) -> None:
    saved, live = nn.Linear(2, 2), nn.Linear(2, 2)
    save(tmp_path, {"model": before(saved)})
    Checkpointer(tmp_path).restore({"model": after(live)})
    assert live.weight.equal(saved.weight)


def test_torch_opens_the_file_and_finds_the_users_own_keys(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path, {"model": nn.DataParallel(model), "epoch": 3})
    payload = torch.load(tmp_path / "step=00000001.ckpt", weights_only=True)
    assert list(payload) == ["model", "epoch", "holdfast"]
    assert list(payload["model"]) == ["weight", "bias"]
    assert payload["model"]["weight"].equal(model.weight)


# -- all or nothing ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters()),
        "t": torch.ones(2),
        "old": nn.Linear(1, 1),
    }
    save(tmp_path, state)
    other = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1), nn.Linear(1, 1, bias=False))
    live = {
        "model": other,
        "optimizer": torch.optim.SGD([{"params": other[0].parameters()}, {"params": other[1].parameters()}]),
        "t": torch.ones(2, dtype=torch.int64),
        "new": nn.Linear(1, 1),
        "epoch": 5,
    }
    before = bits([other.state_dict(), live["t"]])
    assert refused(tmp_path, live) == [
        "step=00000001.ckpt does not fit the state; nothing was restored:",
        "  model/2.weight: in the state, not in the file",
        "  model/0.weight: shape (4, 2) in the state, (3, 2) in the file",
        "  model/0.bias: shape (4,) in the state, (3,) in the file",
        "  model/1.weight: shape (1, 4) in the state, (1, 3) in the file",
        "  optimizer: 2 parameter groups in the state, 1 in the file",
        "  t: int64 (2,) in the state, float32 (2,) in the file",
        "  new: a module in the state, nothing in the file",
        "  epoch: a plain value in the state, nothing in the file",
        "  old: a module in the file, nothing in the state",
        "Give restore() the same objects, built as they were when it was saved.",
    ]
    assert bits([other.state_dict(), live["t"]]) == before


def test_an_optimizers_state_of_another_shape_and_other_kinds(tmp_path: Path) -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([first])
    first.grad = torch.ones(2)
    adam.step()
    save(tmp_path, {"adam": adam, "a": 1, "b": [nn.Linear(1, 1)]})
    assert refused(tmp_path, {"adam": torch.optim.Adam([second]), "a": torch.ones(1), "b": []})[1:-1] == [
        "  adam/state/0/exp_avg: for a parameter of shape (3,) in the state, (2,) in the file",
        "  adam/state/0/exp_avg_sq: for a parameter of shape (3,) in the state, (2,) in the file",
        "  a: a tensor in the state, a plain value in the file",
        "  b: a plain value in the state, a list in the file",
    ]


def test_many_problems_are_counted(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.Sequential(*[nn.Linear(1, 1) for _ in range(10)])})
    lines = refused(tmp_path, {"model": nn.Sequential(*[nn.Linear(2, 2) for _ in range(10)])})
    assert len(lines) == 15
    assert lines[-2] == "  and 8 more"


class Picky:
    """Has a state that it may refuse."""

    def __init__(self, value: int, refuses: bool = False) -> None:
        self.value, self.refuses = value, refuses

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.refuses and state["value"] == 1:
            raise RuntimeError("not this one")
        self.value = state["value"]


class Hooked(nn.Linear):
    """Only it can tell what it takes."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(*args, **kwargs)


def test_what_refuses_its_state_puts_all_the_others_back(tmp_path: Path) -> None:
    def made(seed: int, refuses: bool) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = Hooked(2, 2)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        return {
            "model": model,
            "optimizer": optimizer,
            "plain": nn.Linear(2, 2),
            "first": Picky(seed),
            "generator": torch.Generator().manual_seed(seed),
            "last": Picky(1 if seed == 1 else 5, refuses),
            "epoch": seed,
        }

    def looks(state: dict[str, Any]) -> Any:
        objects = [state[key].state_dict() for key in ("model", "optimizer", "plain", "first", "last")]
        return bits([objects, state["generator"].get_state(), state["epoch"]])

    save(tmp_path, made(1, False))
    live = made(2, True)
    before = looks(live)
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    assert refused(tmp_path, live) == [
        "step=00000001.ckpt does not fit the state: last refused what was saved for it (RuntimeError: not this "
        "one). Everything is as it was before."
    ]
    assert looks(live) == before
    assert torch.rand(1).equal(expected)
    live["last"].refuses = False
    assert Checkpointer(tmp_path).restore(live) == 1
    assert looks(live) == looks(made(1, False))


def test_what_cannot_be_stored_is_named_once_and_stays(tmp_path: Path) -> None:
    rows = torch.utils.data.DataLoader([1, 2])
    state: dict[str, Any] = {"model": nn.Linear(1, 1), "loader": rows, "callback": print, "epoch": 1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(tmp_path, state, 1)
        save(tmp_path, state, 2)
    messages = [str(one.message) for one in caught if "not in the checkpoint" in str(one.message)]
    assert messages == [
        "loader is not in the checkpoint: a DataLoader has no state_dict(); torchdata's StatefulDataLoader has",
        "callback is not in the checkpoint: a function (print) cannot be stored",
    ]
    state["epoch"] = 0
    with pytest.warns(UserWarning, match="Not restored") as told:
        Checkpointer(tmp_path).restore(state)
    assert str(told[0].message) == (
        "Not restored from step=00000002.ckpt, and as it was before: loader (the file could not hold it), "
        "callback (the file could not hold it)."
    )
    assert (state["loader"], state["callback"], state["epoch"]) == (rows, print, 1)
    assert load(tmp_path / "step=00000002.ckpt")["epoch"] == 1


def test_nothing_of_the_file_is_needed_after_restoring(tmp_path: Path) -> None:
    """Large enough to be mapped; then the file is cut to nothing."""
    model = nn.Linear(600, 600)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(600)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "free": torch.ones(100_000), "none": None}
    save(tmp_path, state)
    expected = bits([model.state_dict(), optimizer.state_dict()])
    live = nn.Linear(600, 600)
    other: dict[str, Any] = {
        "model": live,
        "optimizer": torch.optim.Adam(live.parameters()),
        "free": None,
        "none": 1,
    }
    Checkpointer(tmp_path).restore(other)
    path = tmp_path / "step=00000001.ckpt"
    path.write_bytes(b"")
    assert bits([live.state_dict(), other["optimizer"].state_dict()]) == expected
    assert other["free"].sum() == 100_000
    other["optimizer"].step()


def test_a_directory_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Could not create the directory"):
        Checkpointer(tmp_path / "file" / "run").save(1, {"epoch": 1})


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
    ],
)
def test_the_memory_a_state_will_take_is_known_before_the_first_step(
    optimizer: Any, arguments: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(50, 50), nn.BatchNorm1d(50))
    state = {"model": model, "optimizer": optimizer(model.parameters(), **arguments), "free": torch.ones(100)}
    expected = stateful.expected_bytes(state)
    model(torch.randn(3, 50)).sum().backward()
    state["optimizer"].step()
    assert expected == pytest.approx(stateful.size_bytes(stateful.capture(state).values), rel=0.01)


def test_what_may_be_copied_late_is_what_only_a_step_changes() -> None:
    trained, frozen, embedding = nn.Linear(2, 2), nn.Linear(2, 2), nn.Embedding(3, 2, max_norm=1.0)
    frozen.requires_grad_(False)

    class Switching(torch.optim.SGD):
        def eval(self) -> None:
            """Exchanges weights, as schedule-free optimizers do."""

    def late(*optimizers: torch.optim.Optimizer) -> set[int]:
        state = {"models": [trained, frozen, embedding], "optimizers": list(optimizers)}
        return {id(tensor) for tensor in stateful.late_tensors(state)}

    every = [*trained.parameters(), *frozen.parameters(), *embedding.parameters()]
    adam = torch.optim.Adam(every)
    trained(torch.ones(2)).sum().backward()
    adam.step()
    kept = [value for parameter in trained.parameters() for value in adam.state[parameter].values()]
    assert late(adam) == {id(one) for one in [*trained.parameters(), *kept]}
    assert late() == set()
    assert late(Switching(every)) == set()
    adam.param_groups[0]["capturable"] = True
    assert late(adam) == set()


def test_an_optimizer_with_a_state_of_its_own_making(tmp_path: Path) -> None:
    class Counting(torch.optim.SGD):
        calls = 0

        def state_dict(self) -> dict[str, Any]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.calls = state["calls"]

    saved, live = Counting([nn.Parameter(torch.ones(1))]), Counting([nn.Parameter(torch.ones(1))])
    saved.calls = 3
    save(tmp_path, {"optimizer": saved})
    Checkpointer(tmp_path).restore({"optimizer": live})
    assert live.calls == 3
