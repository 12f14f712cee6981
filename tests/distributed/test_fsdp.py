"""FSDP: what a fit computes with sharded weights is what one with whole weights computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdfast as pl
from holdfast.errors import ConfigError
from holdfast.strategies.fsdp import FSDPStrategy

from .fsdp_models import Net, loader, trainer_for, whole
from .ranks import run_ranks


def train(strategy: str, root: str, options: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Fit, then validate, test and predict; what came of it on this rank."""
    net = Net(**model)
    trainer = trainer_for(strategy, root, enable_checkpointing=False, **{"max_epochs": 2, **options})
    trainer.fit(net, loader(), loader())
    weights = whole(dict(net.state_dict()))
    predicted = trainer.predict(net, loader())
    assert predicted is not None
    return {
        "weights": weights,
        "seen": net.seen,
        "step": trainer.global_step,
        "val": trainer.validate(net, loader(), verbose=False),
        "test": trainer.test(net, loader(), verbose=False),
        "predicted": torch.cat(predicted),
    }


FITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulating": ({"accumulate_grad_batches": 3}, {}),
    "clipped by norm": ({"gradient_clip_val": 0.05}, {"optimizer": "sgd"}),
    "clipped by value": ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}),
    "manual": ({}, {"manual": True}),
}


def train_all(root: str) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [train(strategy, root, *given) for strategy in ("fsdp", "ddp")] for name, given in FITS.items()
    }


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    # 3 ranks: no part is even, and scale is smaller than the number of ranks.
    return run_ranks(train_all, str(tmp_path_factory.mktemp("fits")), ranks=3)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_comes_to_what_ddp_comes_to(fits: Any, name: str) -> None:
    sharded, averaged = ([rank[name][which] for rank in fits] for which in (0, 1))
    for one, other in zip(sharded, averaged, strict=True):
        assert (one["seen"], one["step"]) == (other["seen"], other["step"])
        assert list(one["weights"]) == list(other["weights"])
        for name, value in one["weights"].items():
            torch.testing.assert_close(value, other["weights"][name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one["predicted"], other["predicted"], rtol=1e-4, atol=1e-6)
        for stage in ("val", "test"):
            assert one[stage][0]["val"] == pytest.approx(other[stage][0]["val"], rel=1e-4)
    for one in sharded[1:]:
        assert all(torch.equal(value, sharded[0]["weights"][name]) for name, value in one["weights"].items())


class Watched(Net):
    """Notes what its parameters are and which gradients there are, where a user could look."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[int] = []
        self.with_gradient: list[int] = []
        self.whole_in_step: list[bool] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.whole_in_step.append(type(self.scale.data) is Tensor)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.parts = [one.to_local().numel() for one in self.parameters()]
        self.with_gradient.append(sum(one.grad is not None for one in self.parameters()))


def watch(root: str) -> Any:
    net = Watched()
    trainer = trainer_for("fsdp", root, enable_checkpointing=False, accumulate_grad_batches=2)
    trainer.fit(net, loader())
    return type(net).__name__, net.parts, net.with_gradient, all(net.whole_in_step)


def test_each_rank_has_its_part_and_gradients_are_shared_once_a_window(tmp_path: Any) -> None:
    first, second, third = run_ranks(watch, str(tmp_path), ranks=3)
    name, parts, with_gradient, whole_in_step = first
    assert name == "Watched" and whole_in_step  # the module keeps its class
    # scale, shift; 7 and 3 rows of weights and biases: 3 + 3 + 1 and 1 + 1 + 1 of them.
    assert parts == [1, 1, 15, 3, 7, 1]
    assert second[1] == [0, 1, 15, 3, 7, 1]
    assert third[1] == [0, 1, 5, 1, 7, 1]
    # Before the last batch of a window no rank has any gradient that the others had a part in.
    assert with_gradient == [0, 6, 0, 6]


class Tied(pl.LightningModule):
    """Two parts that share a weight, one that is frozen, and one without parameters."""

    def __init__(self, strange: bool = False) -> None:
        super().__init__()
        if not strange:
            torch.manual_seed(0)
        self.one = nn.Linear(5, 5, bias=False)
        self.two = nn.Linear(5, 5, bias=False)
        self.two.weight = self.one.weight
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.nothing = nn.ReLU()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        found = self.one(batch[0])
        for block in self.blocks:
            found = block(found)
        return self.two(self.nothing(self.frozen(found))).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_tied(strategy: str, root: str, policy: Any) -> Any:
    module = Tied()
    chosen: Any = FSDPStrategy(auto_wrap_policy=policy) if strategy == "fsdp" else strategy
    trainer_for(chosen, root, enable_checkpointing=False).fit(module, loader())
    from torch.distributed.fsdp import FSDPModule

    groups = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    return whole(dict(module.state_dict())), groups


def only_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is not None


def fit_all_tied(root: str) -> Any:
    return [fit_tied("fsdp", root, policy) for policy in (None, {nn.Linear}, only_blocks, set())]


def test_tied_and_frozen_weights_under_each_kind_of_policy(tmp_path: Any) -> None:
    expected = run_ranks(fit_tied, "ddp", str(tmp_path), None)[0][0]
    for children, classes, function, root_alone in run_ranks(fit_all_tied, str(tmp_path)):
        for weights, groups in (children, classes, function, root_alone):
            assert groups == ([] if weights is root_alone[0] else ["blocks.0", "blocks.1", "frozen"])
            assert torch.equal(weights["one.weight"], weights["two.weight"])  # the root's
            for name, value in expected.items():
                torch.testing.assert_close(weights[name], value)


class Own(Net):
    """Shards itself."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net[0])
        fully_shard(self)


def fit_own(root: str) -> Any:
    from torch.distributed.fsdp import FSDPModule

    net = Own()
    trainer = trainer_for("fsdp", root, enable_checkpointing=False, accumulate_grad_batches=2)
    trainer.fit(net, loader(), loader())
    return (
        [name for name, part in net.named_modules() if isinstance(part, FSDPModule)],
        whole(dict(net.state_dict())),
    )


def test_a_module_that_shards_itself_is_left_as_it_is(tmp_path: Any) -> None:
    found = run_ranks(fit_own, str(tmp_path))
    expected = run_ranks(train, "ddp", str(tmp_path), {"accumulate_grad_batches": 2, "max_epochs": 1}, {})
    assert [groups for groups, _ in found] == [["", "net.0"]] * 2
    for name, value in expected[0]["weights"].items():
        torch.testing.assert_close(found[0][1][name], value, rtol=1e-4, atol=1e-6)


def start(root: str) -> Any:
    torch.manual_seed(int(__import__("os").environ["RANK"]))
    module = Tied(strange=True)
    trainer_for("fsdp", root, enable_checkpointing=False, max_steps=0).fit(module, loader())
    return whole(dict(module.state_dict()))


def test_all_ranks_start_from_rank_zeros_weights(tmp_path: Any) -> None:
    first, second = run_ranks(start, str(tmp_path))
    torch.manual_seed(0)
    expected = dict(Tied(strange=True).state_dict())
    for name, value in expected.items():
        assert torch.equal(first[name], value) and torch.equal(second[name], value), name


class OnMeta(Net):
    """Built without values."""

    def configure_model(self) -> None:
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def fit_on_meta(root: str) -> Any:
    net = OnMeta()
    trainer_for("fsdp", root, enable_checkpointing=False).fit(net, loader())
    return whole(dict(net.state_dict()))


def test_what_is_built_on_the_meta_device_gets_its_first_values(tmp_path: Any) -> None:
    first, second = run_ranks(fit_on_meta, str(tmp_path))
    assert all(torch.equal(value, second[name]) and value.isfinite().all() for name, value in first.items())
    assert float(first["net.0.weight"].std()) > 0.05


class Ignoring(Net):
    """Forwards through a part's weights rather than through the part."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.linear(batch[0], self.net[0].weight).pow(2).mean()


def fit_ignoring(root: str, policy: Any) -> str:
    trainer = trainer_for(FSDPStrategy(auto_wrap_policy=policy), root, enable_checkpointing=False)
    try:
        trainer.fit(Ignoring(), loader())
    except ConfigError as error:
        return str(error)
    return "trained"


def test_weights_that_are_not_gathered_by_their_part(tmp_path: Any) -> None:
    assert (
        run_ranks(fit_ignoring, str(tmp_path), None)
        == [
            "Ignoring.training_step used weights of a part of the model other than by calling the part, which is "
            "what gathers them. Call the part itself, or leave it out of FSDPStrategy(auto_wrap_policy=...), so "
            "that it is whole during the step."
        ]
        * 2
    )
    assert run_ranks(fit_ignoring, str(tmp_path), set()) == ["trained"] * 2


def fit_synced(root: str) -> str:
    trainer = trainer_for("fsdp", root, enable_checkpointing=False, sync_batchnorm=True)
    trainer.fit(Net(), loader())  # has no such layers
    try:
        trainer.fit(Net(norm=True), loader())
    except ConfigError as error:
        return str(error)
    return "trained"


def test_batchnorm_layers_are_not_synchronized_which_is_said(tmp_path: Any) -> None:
    assert (
        run_ranks(fit_synced, str(tmp_path))
        == [
            "Trainer(sync_batchnorm=True): strategy='fsdp' does not replace BatchNorm layers, and Net has some. Use "
            "strategy='ddp', or leave sync_batchnorm out: each process then uses the statistics of its own part of "
            "a batch."
        ]
        * 2
    )


# -- number formats ------------------------------------------------------------------------------------------


class Formats(Net):
    """Notes the formats in which it computes; on rank 1 the second batch's gradient is infinite on demand."""

    def __init__(self, overflows: bool = False) -> None:
        super().__init__(norm=True, optimizer="sgd")
        self.overflows, self.kept = overflows, []
        self.formats: list[torch.dtype] = []
        self.net[0].register_forward_hook(self.note)

    def note(self, part: Any, given: tuple[Tensor], found: Tensor) -> None:
        self.formats = [part.weight.dtype, found.dtype]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.kept.append(float(self.scale))
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.overflows and batch_idx == 1 and self.global_rank == 1 else loss


def fit_in_format(root: str, precision: str, overflows: bool) -> Any:
    net = Formats(overflows)
    scalers: dict[str, Any] = {}
    options: dict[str, Any] = {"gradient_clip_val": 10.0, "accumulate_grad_batches": 1}
    trainer = trainer_for("fsdp", root, enable_checkpointing=False, precision=precision, **options)
    if overflows:  # from a scale at which nothing overflows by itself
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.fit(net, loader())
    scaler = trainer.precision_plugin.scaler
    if scaler is not None:
        scalers["scale"] = scaler.get_scale()
    saved = {name: value.dtype for name, value in net.state_dict().items()}
    return {"formats": net.formats, "kept": net.kept, "saved": set(saved.values()), **scalers}


@pytest.mark.parametrize(
    ("precision", "formats", "saved"),
    [
        ("32-true", [torch.float32] * 2, {torch.float32, torch.int64}),
        ("bf16-mixed", [torch.bfloat16] * 2, {torch.float32, torch.int64}),
        ("bf16-true", [torch.bfloat16] * 2, {torch.bfloat16, torch.int64}),
    ],
)
def test_number_formats(tmp_path: Any, precision: str, formats: Any, saved: Any) -> None:
    for one in run_ranks(fit_in_format, str(tmp_path), precision, False):
        assert one["formats"] == formats
        assert one["saved"] == saved
        assert len(set(one["kept"])) == len(one["kept"])  # each step changed it


def test_a_gradient_that_is_infinite_on_one_rank_keeps_all_from_stepping(tmp_path: Any) -> None:
    first, second = run_ranks(fit_in_format, str(tmp_path), "16-mixed", True)
    assert first["scale"] == second["scale"] == 4.0  # halved once
    assert first["kept"] == second["kept"]
    kept = first["kept"]
    assert kept[0] != kept[1] == kept[2] != kept[3]


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FSDPStrategy(use_orig_params=True),
            "FSDPStrategy(use_orig_params=...): that was FSDP1's, and fully_shard has no such argument. Parameters "
            "always keep their names and their number: leave it out.",
        ),
        (
            lambda: FSDPStrategy(activation_checkpointing_policy={nn.Linear}),
            "FSDPStrategy(activation_checkpointing_policy=...): that was FSDP1's, and fully_shard has no such "
            "argument. Call torch.utils.checkpoint.checkpoint in the model's forward.",
        ),
        (
            lambda: FSDPStrategy(auto_warp_policy={nn.Linear}),
            "FSDPStrategy() has no argument 'auto_warp_policy'. Did you mean 'auto_wrap_policy'?",
        ),
        (
            lambda: FSDPStrategy(auto_wrap_policy=lambda module, recurse, nonwrapped_numel: True),
            "FSDPStrategy(auto_wrap_policy=...): this is a policy of FSDP1, which torch asks with recurse= and "
            "nonwrapped_numel=. Give a set of module classes, or a function that takes a module and returns a bool.",
        ),
        (
            lambda: FSDPStrategy(auto_wrap_policy="blocks"),
            "FSDPStrategy(auto_wrap_policy='blocks'): expected a set of module classes, such as "
            "{nn.TransformerEncoderLayer}, or a function that takes a module and returns a bool.",
        ),
        (
            lambda: FSDPStrategy(state_dict_type="local"),
            "FSDPStrategy(state_dict_type='local'): expected 'sharded' or 'full'.",
        ),
        (
            lambda: FSDPStrategy(sharding_strategy="NO_SHARD"),
            "FSDPStrategy(sharding_strategy='NO_SHARD') shards nothing: use strategy='ddp'.",
        ),
        (
            lambda: FSDPStrategy(sharding_strategy="all"),
            "FSDPStrategy(sharding_strategy='all'): expected one of 'FULL_SHARD', 'SHARD_GRAD_OP', 'HYBRID_SHARD'.",
        ),
        (
            lambda: FSDPStrategy(mixed_precision="bf16"),
            "FSDPStrategy(mixed_precision=...): expected a torch.distributed.fsdp.MixedPrecisionPolicy, such as "
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), found str. FSDP1's "
            "buffer_dtype has no counterpart: buffers keep their dtype.",
        ),
    ],
)
def test_what_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value) == message


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ConfigError) as refused:
        FSDPStrategy()
    assert str(refused.value) == (
        "FSDPStrategy(): fully_shard needs torch 2.6 or newer, found 2.5.1+cpu. Upgrade torch, or use strategy='ddp'."
    )
