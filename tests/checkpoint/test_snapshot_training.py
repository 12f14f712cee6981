"""Real training loops that save in the background: a file is the moment of its call, or is not there."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moments import LastMoment, bits, equal, holds
from torch import Tensor, nn

from holdfast.checkpoint.engine import CheckpointEngine, SnapshotChanged
from holdfast.errors import HoldfastError

WIDTH = 48  # its weights are large enough to be copied late


class Run:
    """A model, its optimizer, and what a step of training does."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.count = 0

    def batch(self) -> Tensor:
        return torch.randn(4, WIDTH)

    def loss(self) -> Tensor:
        out: Tensor = self.model(self.batch())
        return out.abs().pow(2).mean()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        self.count += 1
        return {
            "count": self.count,
            "state_dict": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }

    def late(self) -> list[Tensor]:
        found = [one for group in self.optimizer.param_groups for one in group["params"]]
        for state in self.optimizer.state.values():
            found += [one for one in state.values() if isinstance(one, Tensor)]
        return found


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))


def adamw(**options: Any) -> Callable[[], Run]:
    def make() -> Run:
        model = two_layers()
        return Run(model, torch.optim.AdamW(model.parameters(), lr=0.1, **options))

    return make


def momentum() -> Run:
    model = two_layers()
    return Run(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True))


def tied() -> Run:
    model = two_layers()
    model[2].weight = model[0].weight
    return Run(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def in_dtype(dtype: torch.dtype) -> Callable[[], Run]:
    class Typed(Run):
        def batch(self) -> Tensor:
            return super().batch().to(dtype)

    def make() -> Run:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=dtype), nn.Linear(WIDTH, WIDTH, dtype=dtype))
        return Typed(model, torch.optim.AdamW(model.parameters(), lr=0.1))

    return make


def views_of_one_buffer() -> Run:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    flat = torch.randn(sum(one.numel() for one in model.parameters()))
    at = 0
    for one in model.parameters():
        one.data = flat[at : at + one.numel()].view_as(one)
        at += one.numel()
    return Run(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def transposed() -> Run:
    model = two_layers()
    model[0].weight.data = torch.randn(WIDTH, WIDTH).t()
    model[2].weight.data = torch.randn(WIDTH, 5 * WIDTH)[:, :WIDTH]  # made dense for the file
    return Run(model, torch.optim.AdamW(model.parameters(), lr=0.1))


class Marked(Tensor):
    """A tensor class of the user's own."""

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone().as_subclass(Tensor)


def subclassed() -> Run:
    model = two_layers()
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Marked))
    return Run(model, torch.optim.AdamW(model.parameters(), lr=0.1))


class Closures(Run):
    """An optimizer that computes the loss within its step: the wait comes first."""

    def step(self) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        self.optimizer.step(closure)  # type: ignore[arg-type]


def lbfgs() -> Run:
    model = nn.Linear(WIDTH, WIDTH)
    return Closures(model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3))


class SparseRun(Run):
    def batch(self) -> Tensor:
        return torch.randint(0, 200, (4, 3))


def sparse_gradients() -> Run:
    model = nn.Embedding(200, WIDTH, sparse=True)
    return SparseRun(model, torch.optim.SparseAdam(model.parameters(), lr=0.1))


class Growing(Run):
    """Trains more from its third step on, and replaces a parameter each fourth."""

    def step(self) -> None:
        super().step()
        if self.count == 3:
            model: Any = self.model
            model.append(nn.Linear(WIDTH, WIDTH))
            self.optimizer.add_param_group({"params": list(model[-1].parameters())})
        if self.count % 4 == 0:
            weight: Any = self.model[2].weight  # type: ignore[index]
            weight.data = torch.randn(WIDTH, WIDTH)


def growing() -> Run:
    model = two_layers()
    return Growing(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5))


class Swapping(Run):
    """Puts other memory under a weight in the forward pass, as quantising and caching code does."""

    def loss(self) -> Tensor:
        weight: Any = self.model[0].weight  # type: ignore[index]
        weight.data = weight.data * 0.5
        return super().loss()


def swapping() -> Run:
    model = two_layers()
    return Swapping(model, torch.optim.SGD(model.parameters(), lr=0.1))


KEEP_THE_PROMISE = {
    "adamw": adamw(),
    "fused": adamw(fused=True),
    "foreach": adamw(foreach=True),
    "amsgrad one by one": adamw(foreach=False, amsgrad=True),
    "momentum": momentum,
    "tied": tied,
    "complex": in_dtype(torch.complex64),
    "bfloat16": in_dtype(torch.bfloat16),
    "views of one buffer": views_of_one_buffer,
    "transposed": transposed,
    "subclass": subclassed,
    "lbfgs": lbfgs,
    "sparse gradients": sparse_gradients,
    "growing": growing,
    "other memory in forward": swapping,
}


@pytest.fixture
def engine() -> Iterator[CheckpointEngine]:
    engine = CheckpointEngine()
    yield engine
    engine.close()


def train(run: Run, engine: CheckpointEngine, into: Path, saves: int = 6) -> tuple[list[Any], list[Any]]:
    """Save after each step, go on training; what each file has to hold, and how each save ended."""
    torch.manual_seed(1)
    moments, ends = [], []
    run.step()
    for number in range(saves):
        state = run.state()
        moments.append(copy.deepcopy(state))
        pending = engine.save_in_background(state, into / f"{number}.ckpt", late=run.late())
        run.step()
        ends.append(pending)
    engine.wait_for_copy()
    return moments, ends


@pytest.mark.parametrize("name", KEEP_THE_PROMISE)
def test_what_only_an_optimizer_changes_is_copied_while_training_goes_on(
    name: str, engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    moments, ends = train(KEEP_THE_PROMISE[name](), engine, tmp_path)
    for number, (moment, pending) in enumerate(zip(moments, ends, strict=True)):
        pending.wait()
        assert holds(tmp_path / f"{number}.ckpt", moment), number
    assert not equal(moments[0]["state_dict"], moments[-1]["state_dict"])
    assert last_moment.copied[:2] == [set(), set()]
    assert last_moment.copied[-1], "nothing was copied late"


# --- what breaks the promise ------------------------------------------------------------------------------


class Tokens(Run):
    def batch(self) -> Tensor:
        return torch.randint(0, 200, (4, 3))

    def loss(self) -> Tensor:
        out: Tensor = self.model(self.batch())
        return (out - 1).pow(2).mean()


def max_norm() -> Run:
    """The forward pass rescales the rows that it reads."""
    model = nn.Sequential(nn.Embedding(200, WIDTH, max_norm=0.5), nn.Linear(WIDTH, WIDTH))
    return Tokens(model, torch.optim.SGD(model.parameters(), lr=0.5))


class Clipping(Run):
    def loss(self) -> Tensor:
        for one in self.model.parameters():
            one.data.clamp_(-0.05, 0.05)
        return super().loss()


def weight_clipping() -> Run:
    model = nn.Linear(WIDTH, WIDTH)
    return Clipping(model, torch.optim.RMSprop(model.parameters(), lr=0.1))


class MomentumEncoder(Run):
    """A second encoder that follows the first, and is in the optimizer since all parameters are."""

    def loss(self) -> Tensor:
        query, key = self.model  # type: ignore[misc]
        for mine, theirs in zip(query.parameters(), key.parameters(), strict=True):
            theirs.data.mul_(0.9).add_(mine.data, alpha=0.1)
        batch = self.batch()
        out: Tensor = (query(batch) - key(batch).detach()).pow(2).mean()
        return out


def momentum_encoder() -> Run:
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    return MomentumEncoder(model, torch.optim.AdamW(model.parameters(), lr=0.1))


class Sharpness(Run):
    """Climbs to where the loss is worst nearby, without a step of any optimizer, and steps from there."""

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        old = {one: one.data.clone() for one in self.model.parameters()}
        with torch.no_grad():
            for one in self.model.parameters():
                assert one.grad is not None
                one.add_(0.05 * one.grad / (one.grad.norm() + 1e-6))
        self.optimizer.zero_grad()
        self.loss().backward()
        for one, before in old.items():
            one.data = before
        self.optimizer.step()


def sharpness_aware() -> Run:
    model = two_layers()
    return Sharpness(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


BREAK_THE_PROMISE = {
    "max_norm": (max_norm, "state_dict/0.weight"),
    "weight clipping": (weight_clipping, "state_dict/weight"),
    "momentum encoder": (momentum_encoder, "state_dict/1.weight"),
    "sharpness aware": (sharpness_aware, "state_dict/0.weight, state_dict/2.weight"),
}


@pytest.mark.parametrize("name", BREAK_THE_PROMISE)
def test_what_changes_between_steps_is_noticed_before_it_is_copied_late(
    name: str, engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    make, changing = BREAK_THE_PROMISE[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        moments, ends = train(make(), engine, tmp_path)
    for number, (moment, pending) in enumerate(zip(moments, ends, strict=True)):
        pending.wait()
        assert holds(tmp_path / f"{number}.ckpt", moment), number
    was, it = ("were", "them") if "," in changing else ("was", "it")
    assert [str(one.message) for one in said] == [
        f"{changing} {was} changed between two steps of the optimizer, by something else. No checkpoint is "
        f"wrong: they copy {it} before training goes on, now and from now on."
    ]
    assert not any(set(changing.split(", ")) & copied for copied in last_moment.copied)


class Turning(Run):
    """Keeps the promise at first; then ``change`` is called before each loss."""

    def __init__(self, change: Callable[[Tensor], None]) -> None:
        model = two_layers()
        super().__init__(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        self.change = change

    def loss(self) -> Tensor:
        if self.count >= 4:
            self.change(self.model[0].weight)  # type: ignore[index, arg-type]
        return super().loss()


def in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight[0, 0] += 1


def through_data(weight: Tensor) -> None:
    weight.data.mul_(0.5)


def moved(weight: Tensor) -> None:
    """Its storage is let go of and made anew, with the same values, as sharding code does."""
    storage = weight.untyped_storage()
    values = weight.detach().clone()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(2 * size)
    weight.data.copy_(values)


@pytest.mark.parametrize("change", [in_place, through_data, moved])
def test_a_change_during_a_late_copy_gives_that_save_up_and_the_next_is_right(
    change: Callable[[Tensor], None],
    engine: CheckpointEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last_moment = LastMoment(monkeypatch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        moments, ends = train(Turning(change), engine, tmp_path, saves=8)
        with pytest.raises(SnapshotChanged) as changed:
            ends[3].wait()
        engine.wait()
        engine.save({}, tmp_path / "last.ckpt")
    assert changed.value.names == ("state_dict/0.weight",)
    assert isinstance(changed.value, HoldfastError)
    assert str(changed.value) == (
        "state_dict/0.weight changed while being copied, so that checkpoint was given up. Save again; from now "
        "on what changed is copied before training goes on."
    )
    assert [str(one.message) for one in said] == [
        "state_dict/0.weight was changed while a checkpoint copied it, by something other than a step of an "
        "optimizer. That checkpoint was given up and older ones are untouched; from now on checkpoints copy it "
        "before training goes on."
    ]
    for number, (moment, pending) in enumerate(zip(moments, ends, strict=True)):
        path = tmp_path / f"{number}.ckpt"
        if number == 3:
            assert not path.exists()
        else:
            pending.wait()
            assert holds(path, moment), number
    assert all("state_dict/0.weight" not in copied for copied in last_moment.copied[4:])
    assert last_moment.copied[-1], "what keeps the promise is still copied late"
    assert not list(tmp_path.glob(".*")), "the file that was given up is gone"


@pytest.mark.filterwarnings("ignore:state_dict.*was changed:UserWarning")
def test_tensors_that_change_one_after_the_other_cost_one_save_of_three_and_not_all(
    engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that was given up has all tensors earn their trust anew, so the next two succeed in any case."""
    LastMoment(monkeypatch)
    values = {f"state_dict/{number}": torch.zeros(64, 64) for number in range(12)}
    ends = []
    for number, value in enumerate(values.values()):
        payload = {"state_dict": {name.partition("/")[2]: one for name, one in values.items()}}
        path = tmp_path / f"{number}.ckpt"
        ends.append(engine.save_in_background(payload, path, late=list(values.values())))
        if number >= 2:
            value += 1
        engine.wait_for_copy()
    engine.wait()
    engine.save({}, tmp_path / "last.ckpt")
    given_up = [number for number in range(12) if not (tmp_path / f"{number}.ckpt").exists()]
    assert given_up == [2, 5, 8, 11]
    for number in given_up:
        with pytest.raises(SnapshotChanged):
            ends[number].wait()


def test_an_optimizer_that_steps_in_another_thread_waits_for_the_copy(
    engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    run = adamw()()
    moments, ends = [], []
    run.step()
    for number in range(4):
        state = run.state()
        moments.append(copy.deepcopy(state))
        ends.append(engine.save_in_background(state, tmp_path / f"{number}.ckpt", late=run.late()))
        if number < 2:  # only the thread that saves finds out what changes before its own steps
            run.step()
        else:
            thread = threading.Thread(target=run.step)
            thread.start()
            thread.join()
        assert not engine.copying
    assert last_moment.copied[-1]
    for number, moment in enumerate(moments):
        ends[number].wait()
        assert holds(tmp_path / f"{number}.ckpt", moment)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_step_waits_for_the_copy_too(
    engine: CheckpointEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_moment = LastMoment(monkeypatch)
    run = momentum()
    run.step()
    step = torch.compile(run.optimizer.step, backend="eager")
    for number in range(5):
        run.loss().backward()
        state = run.state()
        moment = copy.deepcopy(state)
        pending = engine.save_in_background(state, tmp_path / "a.ckpt", late=run.late())
        step()
        assert not engine.copying
        pending.wait()
        assert holds(tmp_path / "a.ckpt", moment), number
    assert last_moment.copied[-1]


def test_many_saves_have_many_contents(engine: CheckpointEngine, tmp_path: Path) -> None:
    torch.manual_seed(1)
    run = adamw()()
    moments = []
    for number in range(20):
        run.step()
        state = run.state()
        moments.append(copy.deepcopy(state["state_dict"]))
        engine.save_in_background(state, tmp_path / f"{number}.ckpt", late=run.late())
    engine.wait()
    loaded = [torch.load(tmp_path / f"{number}.ckpt")["state_dict"] for number in range(20)]
    assert equal(loaded, moments)
    assert len({bits(one["0.weight"]) for one in loaded}) == 20
