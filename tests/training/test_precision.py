"""Number formats: what they convert, what users override, and that a resume loses no bit of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint
from holdfast.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from holdfast.strategies import SingleDeviceStrategy
from holdfast.training.precision import make_precision
from tests.training.toys import Toy, rows, trainer


class Momentum(Toy):
    """Toy with a state to lose: momentum, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def loss(self, batch: Any) -> torch.Tensor:
        return self.layer(self.norm(batch[0])).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class TestSpellings:
    @pytest.mark.filterwarnings("ignore:.* is the spelling of 1.x:DeprecationWarning")
    @pytest.mark.parametrize(
        ("spelling", "name", "kind"),
        [
            (None, "32-true", Precision),
            (32, "32-true", Precision),
            ("32", "32-true", Precision),
            ("32-true", "32-true", Precision),
            (16, "16-mixed", MixedPrecision),
            ("16", "16-mixed", MixedPrecision),
            ("16-mixed", "16-mixed", MixedPrecision),
            ("bf16", "bf16-mixed", MixedPrecision),
            ("bf16-mixed", "bf16-mixed", MixedPrecision),
            ("16-true", "16-true", HalfPrecision),
            ("bf16-true", "bf16-true", HalfPrecision),
            (64, "64-true", DoublePrecision),
            ("64", "64-true", DoublePrecision),
            ("64-true", "64-true", DoublePrecision),
        ],
    )
    def test_each(self, spelling: Any, name: str, kind: type[Precision]) -> None:
        run = trainer(precision=spelling)
        assert (run.precision, run.precision_plugin.precision) == (name, name)
        assert type(run.precision_plugin) is kind

    @pytest.mark.parametrize(
        ("spelling", "message"),
        [
            (
                "8-bit",
                "Trainer(precision='8-bit'): expected one of '32-true', '16-mixed', 'bf16-mixed', '16-true', "
                "'bf16-true', '64-true'.",
            ),
            (
                "transformer-engine",
                "Trainer(precision='transformer-engine'): TransformerEngine is not supported. Use 'bf16-mixed' or "
                "'bf16-true'.",
            ),
        ],
    )
    def test_what_there_is_not(self, spelling: Any, message: str) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            make_precision(spelling, torch.device("cpu"))
        assert str(refused.value) == message

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: MixedPrecision("16", "cpu"),
                "MixedPrecision(precision='16'): expected '16-mixed' or 'bf16-mixed'.",
            ),
            (
                lambda: MixedPrecision("bf16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu")),
                "MixedPrecision('bf16-mixed', scaler=GradScaler): bfloat16 has the range of float32, so its "
                "gradients are not scaled. Leave scaler= out.",
            ),
            (
                lambda: HalfPrecision("64-true"),
                "HalfPrecision(precision='64-true'): expected '16-true' or 'bf16-true'.",
            ),
        ],
    )
    def test_plugins_that_cannot_be(self, make: Any, message: str) -> None:
        with pytest.raises(pl.ConfigError) as refused:
            make()
        assert str(refused.value) == message


class TestConversion:
    def test_a_batch_of_any_shape(self) -> None:
        converted = HalfPrecision("bf16-true").convert_input(
            {"x": [torch.zeros(1), torch.zeros(1, dtype=torch.int64)], "y": (torch.zeros(1).double(), "text")}
        )
        assert converted["x"][0].dtype == converted["y"][0].dtype == torch.bfloat16
        assert converted["x"][1].dtype == torch.int64
        assert converted["y"][1] == "text"

    def test_new_tensors_and_modules(self) -> None:
        strategy = SingleDeviceStrategy("cpu", precision_plugin=DoublePrecision())
        with strategy.tensor_init_context():
            assert torch.zeros(1).dtype == torch.float64
            assert nn.Linear(1, 1).weight.dtype == torch.float64
        with HalfPrecision().module_init_context():
            assert nn.Linear(1, 1).weight.dtype == torch.float16
        assert torch.zeros(1).dtype == torch.float32

    def test_weights_may_stay_uninitialised(self) -> None:
        with SingleDeviceStrategy("cpu").tensor_init_context(empty_init=True):
            torch.manual_seed(0)
            before = torch.get_rng_state()
            nn.Linear(4, 4)
            assert torch.equal(torch.get_rng_state(), before)

    def test_full_precision_has_nothing_for_a_step_to_do(self) -> None:
        precision = Precision()
        assert (precision.context, precision.scaler, precision.converts_input) == (None, None, False)
        model = nn.Linear(1, 1)
        assert precision.convert_module(model) is model
        assert precision.connect(model, [], []) == (model, [], [])


class TestClipping:
    @pytest.mark.parametrize(("algorithm", "expected"), [("norm", 1.0), ("value", 2.0**0.5)])
    def test_by_norm_and_by_value(self, algorithm: str, expected: float) -> None:
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.full((2,), 100.0)
        Precision().clip_gradients(torch.optim.SGD([parameter], lr=1.0), 1.0, algorithm)
        assert parameter.grad.norm().item() == pytest.approx(expected)

    def test_by_hand_with_a_scaler_clips_the_true_gradients(self) -> None:
        norms: list[float] = []

        class Manual(Toy):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                self.clip_gradients(optimizer, 0.01, "norm")
                norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())
                optimizer.step()

            def on_before_optimizer_step(self, optimizer: Any) -> None:
                norms.append(torch.cat([p.grad.flatten() for p in self.parameters()]).norm().item())

        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        model = Manual()
        run = trainer(plugins=MixedPrecision("16-mixed", "cpu", scaler))
        run.fit(model, rows())
        assert norms == pytest.approx([0.01] * 6, rel=1e-3)
        assert run.precision_plugin.scaler is scaler

    def test_lbfgs_does_not_go_with_a_scaler(self) -> None:
        class Second(Toy):
            def configure_optimizers(self) -> Any:
                return torch.optim.LBFGS(self.parameters())

        with pytest.raises(pl.ConfigError) as refused:
            trainer(precision="16-mixed").fit(Second(), rows())
        assert str(refused.value) == (
            "LBFGS does not work with precision='16-mixed': it evaluates the loss again in the middle of its step, "
            "where scaled gradients mean nothing. Use precision='bf16-mixed' or '32-true'."
        )


class TestOfOnesOwn:
    def test_every_part_is_called(self) -> None:
        called: list[str] = []

        class Own(Precision):
            precision = "own"

            @contextmanager
            def forward_context(self) -> Iterator[None]:
                called.append("enter")
                yield
                called.append("leave")

            def convert_module(self, module: nn.Module) -> nn.Module:
                called.append("module")
                return module

            def convert_input(self, data: Any) -> Any:
                called.append("input")
                return data

            def connect(self, model: Any, optimizers: Any, lr_schedulers: Any) -> Any:
                called.append(f"connect {len(optimizers)}")
                return model, optimizers, lr_schedulers

            def clip_grad_by_norm(self, optimizer: Any, clip_val: Any) -> None:
                called.append(f"clip {clip_val}")

            def optimizer_step(self, optimizer: Any, model: Any, closure: Any = None, **kwargs: Any) -> Any:
                called.append("step")
                result = super().optimizer_step(optimizer, model, closure, **kwargs)
                called.append("stepped")
                return result

        plugin = Own()
        run = trainer(plugins=[plugin], gradient_clip_val=0.25, max_steps=1)
        run.fit(Toy(), rows())
        assert run.precision_plugin is run.strategy.precision_plugin is plugin
        assert run.precision == "own"
        assert called == [
            "module", "connect 1", "input", "step", "enter", "leave", "clip 0.25", "stepped",
        ]  # fmt: skip
        called.clear()

        class Evaluated(Toy):
            def validation_step(self, batch: Any, batch_idx: int) -> None:
                called.append("validate")

        run.validate(Evaluated(), rows(4))
        assert called == ["module", "input", "enter", "validate", "leave"]


class TestResume:
    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "16-true", "bf16-true", "64-true"])
    def test_is_bit_identical_in_every_format(self, precision: str, tmp_path: Path) -> None:
        def run(folder: str, steps: int, **resumed: Any) -> dict[str, torch.Tensor]:
            saves = ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_top_k=-1)
            pl.seed_everything(1)
            model = Momentum()
            trainer(precision=precision, max_epochs=-1, max_steps=steps, callbacks=[saves]).fit(
                model, rows(batch_size=3, shuffle=True), **resumed
            )
            return model.state_dict()

        whole = run("whole", 10)
        run("cut", 4)
        gone_on = run("cut", 10, ckpt_path="last")
        assert {name: value.dtype for name, value in whole.items()} == {
            name: value.dtype for name, value in gone_on.items()
        }
        for name, value in whole.items():
            assert torch.equal(value, gone_on[name]), name
