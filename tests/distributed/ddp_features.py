"""Modules and jobs that use what DDP has to offer; each job's ranks return what the tests look at."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import holdfast as pl
from holdfast.callbacks import BaseFinetuning
from holdfast.strategies import DDPStrategy
from holdfast.strategies.reducing import fix_order, learned_order

from .ddp_jobs import Net, PlainNet, bits, loader, trainer_for


def fit(
    module: Any, place: Path, strategy: Any = "ddp", *, validate: bool = False, **options: Any
) -> pl.Trainer:
    torch.manual_seed(3)
    trainer = trainer_for(place, strategy, **{"max_epochs": 1, "enable_checkpointing": False, **options})
    trainer.fit(module, loader(trainer), loader(trainer) if validate else None)
    return trainer


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(5)
    return make()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def trained(make: Callable[[], Any], place: Path, strategy: Any = "ddp", **options: Any) -> dict[str, Tensor]:
    """The weights of a module that was trained, the same in a job and in one process."""
    module = seeded(make)
    fit(module, place, strategy, **options)
    return values(module)


# -- modules -------------------------------------------------------------------------------------------------


class TwoOptimizers(PlainNet):
    """Manual optimization: two networks, one of which is trained against the other, with toggled optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        mine, theirs = self.optimizers()
        self.toggle_optimizer(mine)
        loss = (self(x) - self.other(x).squeeze(-1)).pow(2).mean() + (self(x) - y).pow(2).mean()
        self.manual_backward(loss)
        mine.step()
        mine.zero_grad()
        self.untoggle_optimizer(mine)
        self.toggle_optimizer(theirs)
        for sign in (1.0, 2.0):  # two backwards before one step
            self.manual_backward(sign * (self(x).detach() - self.other(x).squeeze(-1) + y).pow(2).mean())
        theirs.step()
        theirs.zero_grad()
        self.untoggle_optimizer(theirs)

    def configure_optimizers(self) -> Any:
        mine = [one for name, one in self.named_parameters() if not name.startswith("other")]
        return torch.optim.Adam(mine, lr=0.01), torch.optim.SGD(self.other.parameters(), lr=0.05)


class AddsUpFirst(PlainNet):
    """Manual optimization that averages the gradients of two batches at once."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        steps = batch_idx % 2 == 1
        with optimizer.toggle_model(sync_grad=steps):
            self.manual_backward((self(batch[0]) - batch[1]).pow(2).mean())
        if steps:
            optimizer.step()
            optimizer.zero_grad()


class PlainBackward(AddsUpFirst):
    """Manual optimization with torch's own backward, which leaves each rank with its own gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (self(batch[0]) - batch[1]).pow(2).mean().backward()
        self.optimizers().step()


class ByLineSearch(PlainNet):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


class WithoutLoss(PlainNet):
    """Has no loss for some batches: of rank 1 for the third, of all ranks for the fifth."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 4 or (batch_idx == 2 and self.trainer.global_rank == 1):
            return None
        return super().training_step(batch, batch_idx)


class NoneForAll(PlainNet):
    """Has no loss for the second and the fifth batch, on no rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in (1, 4) else super().training_step(batch, batch_idx)


class LeftOut(PlainNet):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.also = nn.Parameter(torch.zeros(1))


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer)


class Finetuned(PlainNet):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.1)


class Nothing(pl.LightningModule):
    """Trains nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


class LookedAt(Net):
    """Keeps what the strategy shows while it trains, and the buffers that it validates with."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Any] = []
        self.validated: list[Any] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        model = self.trainer.strategy.model
        self.shown = [type(model), model.module.module is self, self.trainer.lightning_module is self]

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self.validated.append(bits(self.norm.running_mean))


# -- jobs ----------------------------------------------------------------------------------------------------

ALIKE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "automatic optimization": (PlainNet, {}),
    "accumulation and clipping": (PlainNet, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
    "several optimizers": (TwoOptimizers, {}),
    "manual accumulation": (AddsUpFirst, {}),
    "a line search": (ByLineSearch, {}),
    "finetuning": (Finetuned, {"max_epochs": 2, "callbacks": Unfreezes}),
}
"""What ranks with the same global batches train to the same weights as one process."""


def made(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value() if key == "callbacks" else value for key, value in options.items()}


def train_alike(place: Path) -> dict[str, dict[str, Tensor]]:
    return {name: trained(make, place, **made(options)) for name, (make, options) in ALIKE.items()}


def look_at(place: Path) -> dict[str, Any]:
    """One job with all that can be looked at without an error."""
    found: dict[str, Any] = {}
    module = seeded(LookedAt)
    trainer = fit(module, place, validate=True, val_check_interval=3)
    found["shown"], found["after"] = module.shown[0].__name__, trainer.strategy.model is module
    found["same"] = module.shown[1:]
    found["validated"], found["buffers"] = module.validated, bits(dict(module.named_buffers()))
    found["warned"] = warned_of(lambda: fit(PlainBackward(), place))
    found["nothing"] = fit(Nothing(), place, max_steps=3).global_step
    found["without loss"] = trained(WithoutLoss, place)
    found["without loss, scaled"] = trained(WithoutLoss, place, precision="16-mixed")
    found["none for all"] = trained(NoneForAll, place)
    found["unused"] = trained(LeftOut, place, "ddp_find_unused_parameters_true")
    return found


def warned_of(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in said if "manual_backward" in str(one.message)]


class Counted:
    """A communication hook that counts buckets, and keeps which gradients lie in which."""

    def __init__(self) -> None:
        self.buckets: list[Any] = []

    def take(self, state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations
        self.buckets.append(tuple(tuple(one.shape) for one in bucket.parameters()))
        work: Any = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


def count(place: Path, options: dict[str, Any]) -> list[Any]:
    """The buckets that were averaged in an epoch of eight batches, in order."""
    counted = Counted()
    fit(seeded(Net), place, DDPStrategy(bucket_cap_mb=0.002, ddp_comm_hook=counted.take), **options)
    return counted.buckets


def fix_the_order_of(place: Path) -> dict[str, Any]:
    """What `fix_order` leaves behind, and the buckets of the steps after it."""
    trainer_for(place).strategy.setup_environment()
    module = seeded(Net)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    called: list[str] = []
    module.head.weight.register_hook(lambda gradient: called.append("hook"))
    module.head.bias.register_post_accumulate_grad_hook(lambda parameter: called.append("after"))
    before = bits(values(module)), bits(torch.get_rng_state())
    wrapped = DistributedDataParallel(module, bucket_cap_mb=0.002)
    order = [name for name, _ in module.named_parameters()]
    random.Random(1).shuffle(order)
    fix_order(wrapped, order)
    found: dict[str, Any] = {"called": list(called), "again": wrapped.reducer._rebuild_buckets()}
    found["shapes"] = [tuple(values(module)[name].shape) for name in order]
    found["unchanged"] = before == (bits(values(module)), bits(torch.get_rng_state()))
    found["gradients"] = all(bool((one.grad == 1).all()) for one in module.parameters())
    counted = Counted()
    wrapped.register_comm_hook(None, counted.take)
    found["steps"] = []
    for _ in range(3):
        counted.buckets.clear()
        wrapped(torch.rand(4, 8)).sum().backward()
        found["steps"].append(list(counted.buckets))
    found["order"] = learned_order(wrapped) == order
    found["called later"] = sorted(set(called))
    return found


def fail(make: Callable[[], Any], place: Path, strategy: Any, options: dict[str, Any]) -> str:
    """The message of the error that a job ends with."""
    try:
        fit(seeded(make), place, strategy, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def fail_statically(place: Path) -> str:
    return fail(TwoOptimizers, place, DDPStrategy(static_graph=True), {})


class TrainsOther(PlainNet):
    def configure_model(self) -> None:
        if self.trainer.global_rank == 1:
            self.head.bias.requires_grad = False
