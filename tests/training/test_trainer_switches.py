"""Arguments of Trainer that switch something of torch's on, and limits of test and predict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.loggers import CSVLogger
from tests.training.toys import Toy, rows, trainer


@pytest.fixture(autouse=True)
def switches_of_torch() -> Iterator[None]:
    """Set them back."""
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


class Evaluated(Toy):
    """Logs how many rows it saw; remembers whether its last evaluation ran in inference mode."""

    inference: bool | None = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.inference = torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.inference = torch.is_inference_mode_enabled()
        self.log("rows", float(len(batch[0])), reduce_fx="sum", on_epoch=True, on_step=False)

    def predict_step(self, batch: Any, batch_idx: int) -> list[int]:
        self.inference = torch.is_inference_mode_enabled()
        return batch[1].tolist()  # type: ignore[no-any-return]


class NotFinite(Toy):
    """Its loss is a number, the gradient of it is not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(batch[0]) * 0).sqrt().sum()


@pytest.mark.parametrize(("deterministic", "warns_only"), [(True, False), ("warn", True)])
def test_deterministic_algorithms(deterministic: Any, warns_only: bool) -> None:
    trainer(deterministic=deterministic)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() == warns_only


@pytest.mark.parametrize("benchmark", [True, False])
def test_benchmark(benchmark: bool) -> None:
    torch.backends.cudnn.benchmark = not benchmark
    trainer(benchmark=None)
    assert torch.backends.cudnn.benchmark is not benchmark
    trainer(benchmark=benchmark)
    assert torch.backends.cudnn.benchmark is benchmark


def test_detect_anomaly_names_the_function_whose_gradient_is_nan() -> None:
    with (
        pytest.warns(UserWarning, match="Error detected in MulBackward0"),
        pytest.raises(RuntimeError, match="Function 'MulBackward0' returned nan values"),
    ):
        trainer(detect_anomaly=True).fit(NotFinite(), rows())
    assert not torch.is_anomaly_enabled()
    run = trainer(detect_anomaly=False)
    run.fit(NotFinite(), rows())
    assert run.global_step == 3


@pytest.mark.parametrize("request_", ["validate", "test", "predict"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluations_run_in_inference_mode_unless_told_otherwise(request_: str, inference_mode: bool) -> None:
    model = Evaluated()
    getattr(trainer(inference_mode=inference_mode), request_)(model, rows())
    assert model.inference is inference_mode


@pytest.mark.parametrize(("limit", "seen"), [(2, 8), (0.34, 4), (1.0, 12), (99, 12)])
def test_limits_of_test_and_predict(limit: Any, seen: int) -> None:
    limits = {"limit_test_batches": limit, "limit_predict_batches": limit}
    assert trainer(**limits).test(Evaluated(), rows(), verbose=False) == [{"rows": seen}]
    predicted = trainer(**limits).predict(Evaluated(), rows())
    assert predicted is not None
    assert [row for batch in predicted for row in batch] == list(range(seen))


def test_limits_of_nothing() -> None:
    limits = {"limit_test_batches": 0, "limit_predict_batches": 0}
    model = Evaluated()
    assert trainer(**limits).test(model, rows(), verbose=False) == []
    assert trainer(**limits).predict(model, rows()) == []
    assert model.inference is None


def test_hyperparameters_are_not_logged_by_themselves_if_so_told(tmp_path: Path) -> None:
    for name, logged in (("yes", True), ("no", False)):
        run = trainer(logger=CSVLogger(tmp_path, name=name), enable_autolog_hparams=logged)
        run.fit(Toy(lr=0.2), rows())
        assert (tmp_path / name / "version_0" / "hparams.yaml").exists() == logged


def test_the_model_prints_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    class Talking(Toy):
        def on_train_start(self) -> None:
            self.print("lr", self.hparams.lr, sep="=", end=".\n")

    trainer().fit(Talking(), rows())
    assert "lr=0.1.\n" in capsys.readouterr().out


def test_deterministic_false_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        trainer(deterministic=True)
        import os

        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        trainer(deterministic=False)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
