"""A module leaves as TorchScript or ONNX: what it computes in evaluation mode, and the module as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdfast as pl
from holdfast.errors import ConfigError

from .toys import rows, trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(pl.LightningModule):
    """Dropout and BatchNorm tell whether it evaluates."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1)
        )
        self.example_input_array = torch.rand(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def evaluated(model: Net, inputs: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        outputs = model(inputs)
    model.train()
    return outputs


class TestTorchScript:
    @pytest.mark.parametrize("method", ["script", "trace", None])
    @pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
    def test_computes_what_the_module_does(self, method: str | None, trained: bool, tmp_path: Path) -> None:
        model, inputs = Net(), torch.rand(5, 3)
        if trained:
            trainer().fit(model, rows())
        attached = model._trainer
        model.train()
        program = model.to_torchscript(tmp_path / "model.pt", method=method)
        assert model._trainer is attached
        assert all(part.training for part in model.modules())
        assert torch.equal(program(inputs), evaluated(model, inputs))
        assert torch.equal(torch.jit.load(tmp_path / "model.pt")(inputs), evaluated(model, inputs))

    def test_trace_takes_inputs_of_its_own(self) -> None:
        model = Net()
        model.example_input_array = None
        program = model.to_torchscript(method="trace", example_inputs=torch.zeros(7, 3))
        assert program(torch.rand(7, 3)).shape == (7, 1)

    def test_trace_without_an_input(self) -> None:
        model = Net()
        model.example_input_array = None
        with pytest.raises(ConfigError) as caught:
            model.to_torchscript(method="trace")
        assert str(caught.value) == (
            "Net.to_torchscript(method='trace') needs an input to run forward on: give example_inputs=, or "
            "set self.example_input_array in __init__."
        )

    def test_another_method(self) -> None:
        with pytest.raises(ConfigError) as caught:
            Net().to_torchscript(method="compile")
        assert str(caught.value) == "to_torchscript(method='compile'): expected 'script' or 'trace'."


class TestOnnx:
    def test_computes_what_the_module_does(self, tmp_path: Path) -> None:
        import onnx
        from onnx.reference import ReferenceEvaluator

        model, inputs = Net(), torch.rand(2, 3)
        model.to_onnx(tmp_path / "model.onnx")
        program = onnx.load(tmp_path / "model.onnx")
        onnx.checker.check_model(program)
        (outputs,) = ReferenceEvaluator(program).run(None, {program.graph.input[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.tensor(outputs), evaluated(model, inputs))
        assert all(part.training for part in model.modules())

    def test_a_package_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(ConfigError) as caught:
            Net().to_onnx("model.onnx")
        assert str(caught.value) == (
            "to_onnx needs the packages onnx and onnxscript, and onnxscript is not installed: "
            "pip install onnx onnxscript."
        )


def test_tensorrt_says_what_to_use() -> None:
    with pytest.raises(ConfigError) as caught:
        Net().to_tensorrt("model.ts")
    assert str(caught.value) == (
        "Net.to_tensorrt is not there. Compile the module with torch_tensorrt.compile(model.eval(), ...), or "
        "build an engine from the file of to_onnx."
    )
