"""strategy=, accelerator=, devices=, num_nodes=: every spelling, and what each refusal says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator, MPSAccelerator
from holdfast.accelerators.base import parse_indices
from holdfast.errors import ArgumentError
from holdfast.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from holdfast.strategies.choose import choose_strategy


@pytest.mark.parametrize(
    "arguments",
    [
        {"accelerator": "cpu"},
        {"accelerator": "CPU", "devices": 1},
        {"accelerator": "cpu", "devices": "1"},
        {"accelerator": "cpu", "devices": "auto", "num_nodes": 1},
        {"accelerator": CPUAccelerator(), "strategy": "single_device"},
        {"accelerator": "cpu", "strategy": "ddp"},
        {"accelerator": "cpu", "strategy": "ddp_find_unused_parameters_true", "devices": 1},
        {"accelerator": "cpu", "strategy": "ddp_spawn"},
        {"accelerator": "cpu", "strategy": "ddp_notebook"},
        {"strategy": SingleDeviceStrategy("cpu")},
        {"strategy": SingleDeviceStrategy("cpu"), "accelerator": "cpu"},
        {"strategy": SingleDeviceStrategy(torch.device("cpu"), accelerator=CPUAccelerator())},
        {"strategy": SingleDeviceStrategy("cpu", CPUAccelerator()), "accelerator": "cpu"},
    ],
)
def test_one_process_in_every_spelling(arguments: dict[str, Any]) -> None:
    strategy = choose_strategy(**arguments)
    assert type(strategy) is SingleDeviceStrategy
    assert isinstance(strategy, Strategy)
    assert isinstance(strategy.accelerator, CPUAccelerator)
    assert (strategy.root_device, strategy.world_size, strategy.global_rank, strategy.local_rank) == (
        torch.device("cpu"), 1, 0, 0,
    )  # fmt: skip
    assert (strategy.is_global_zero, strategy.node_rank) == (True, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"accelerator": "cpu", "devices": 2},
            "Trainer(devices=2): one process on one device is what there is so far. Use devices=1.",
        ),
        (
            {"accelerator": "cpu", "devices": 2, "strategy": "ddp"},
            "Trainer(devices=2): one process on one device is what there is so far. Use devices=1.",
        ),
        (
            {"accelerator": "cpu", "devices": 0},
            "Trainer(devices=0): on the CPU it is a number of processes, at least 1, or 'auto'.",
        ),
        (
            {"accelerator": "cpu", "devices": -1},
            "Trainer(devices=-1): on the CPU it is a number of processes, at least 1, or 'auto'.",
        ),
        (
            {"accelerator": "cpu", "devices": [0]},
            "Trainer(devices=[0]): on the CPU it is a number of processes, at least 1, or 'auto'.",
        ),
        (
            {"accelerator": "cpu", "devices": "0"},
            "Trainer(devices='0'): on the CPU it is a number of processes, at least 1, or 'auto'.",
        ),
        ({"num_nodes": 2}, "Trainer(num_nodes=2): one machine is what there is so far."),
        ({"num_nodes": 0}, "Trainer(num_nodes=0): expected an int of at least 1."),
        (
            {"accelerator": "tpu"},
            "Trainer(accelerator='tpu'): TPUs are not supported. Use 'gpu' or 'cpu'.",
        ),
        (
            {"accelerator": "hpu"},
            "Trainer(accelerator='hpu'): Gaudi HPUs are not supported. Use 'gpu' or 'cpu'.",
        ),
        (
            {"accelerator": "ipu"},
            "Trainer(accelerator='ipu'): Graphcore IPUs are not supported. Use 'gpu' or 'cpu'.",
        ),
        (
            {"accelerator": "cpuu"},
            "Trainer(accelerator='cpuu'): expected one of 'auto', 'cpu', 'gpu', 'cuda', 'mps', or an Accelerator. "
            "Did you mean 'cpu'?",
        ),
        (
            {"strategy": "dpp"},
            "Trainer(strategy='dpp'): expected 'auto', 'single_device', 'ddp' with one device, or a Strategy. Did "
            "you mean 'ddp'?",
        ),
        (
            {"strategy": "deepspeed_stage_2"},
            "Trainer(strategy='deepspeed_stage_2') is not supported. A model that fits one device trains with "
            "strategy='auto', in less memory with precision='bf16-true'.",
        ),
        (
            {"strategy": "fsdp"},
            "Trainer(strategy='fsdp') is not supported. A model that fits one device trains with strategy='auto', "
            "in less memory with precision='bf16-true'.",
        ),
        (
            {"strategy": "dp"},
            "Trainer(strategy='dp') is not supported. It was replaced by 'ddp' in Lightning 2. Use strategy='auto'.",
        ),
        (
            {"strategy": "horovod"},
            "Trainer(strategy='horovod') is not supported. Use strategy='auto'.",
        ),
        (
            {"strategy": "colossalai"},
            "Trainer(strategy='colossalai') is not supported. A model that fits one device trains with "
            "strategy='auto'.",
        ),
        (
            {"strategy": "xla"},
            "Trainer(strategy='xla') is not supported. TPUs are not supported. Use strategy='auto' with "
            "accelerator='gpu' or 'cpu'.",
        ),
        (
            {"strategy": SingleDeviceStrategy("cuda", CUDAAccelerator()), "accelerator": "cpu"},
            "Trainer(accelerator='cpu') contradicts SingleDeviceStrategy(accelerator=CUDAAccelerator()). Leave one "
            "out.",
        ),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(pl.ConfigError) as refused:
        choose_strategy(**arguments)
    assert str(refused.value) == message


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("gpu", "cuda"):
        with pytest.raises(pl.ConfigError) as refused:
            choose_strategy(accelerator=name)
        assert str(refused.value) == (
            f"Trainer(accelerator='{name}'): torch sees no GPU here. Use accelerator='auto'."
        )
    with pytest.raises(pl.ConfigError) as refused:
        choose_strategy(accelerator="mps")
    assert str(refused.value) == "Trainer(accelerator='mps'): there is none here. Use accelerator='auto'."
    assert isinstance(choose_strategy().accelerator, CPUAccelerator)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for accelerator in ("auto", "gpu", "cuda", CUDAAccelerator()):
        strategy = choose_strategy(accelerator=accelerator)
        assert strategy.root_device == torch.device("cuda", 0)
        assert isinstance(strategy.accelerator, CUDAAccelerator)
    for devices, index in {1: 0, "1": 0, "3,": 3, "auto": 0}.items():
        assert choose_strategy("auto", "gpu", devices).root_device == torch.device("cuda", index)
    assert choose_strategy("auto", "gpu", [2]).root_device == torch.device("cuda", 2)
    for many in (2, -1, "0, 1", [0, 1]):
        with pytest.raises(pl.ConfigError, match="one process on one device is what there is so far"):
            choose_strategy("auto", "gpu", many)


@pytest.mark.parametrize("devices", [0, "0", [], True, 1.5, None, [1, 1], "x"])
def test_no_devices(devices: Any) -> None:
    with pytest.raises(ArgumentError) as refused:
        parse_indices(devices, 4, "GPU")
    assert str(refused.value) == (
        f"Trainer(devices={devices!r}): expected a number of GPUs, a list of their indices, -1 or 'auto'."
    )


def test_indices_that_are_not_there() -> None:
    with pytest.raises(pl.ConfigError) as refused:
        parse_indices([3], 2, "GPU")
    assert str(refused.value) == "Trainer(devices=[3]): there are 2 GPUs here: [0, 1]."


def test_several_processes_say_what_there_is() -> None:
    with pytest.raises(pl.ConfigError) as refused:
        DDPStrategy(find_unused_parameters=True)
    assert str(refused.value) == (
        "DDPStrategy(): one process on one device is what there is so far. Use Trainer(strategy='auto', devices=1); "
        "strategy='ddp' with one device runs the same in one process."
    )


def test_an_accelerator_of_ones_own() -> None:
    class Own(Accelerator):
        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [torch.device("meta")] * devices

        @staticmethod
        def auto_device_count() -> int:
            return 1

        @staticmethod
        def is_available() -> bool:
            return True

    own = Own()
    strategy = choose_strategy(accelerator=own)
    assert (strategy.accelerator, strategy.root_device) == (own, torch.device("meta"))


def test_what_accelerators_say() -> None:
    assert [cls.name() for cls in (CPUAccelerator, CUDAAccelerator, MPSAccelerator)] == ["cpu", "cuda", "mps"]
    assert CPUAccelerator.is_available()
    assert CPUAccelerator.auto_device_count() == 1
    assert CPUAccelerator.get_parallel_devices(2) == [torch.device("cpu")] * 2
    assert CPUAccelerator().get_device_stats("cpu") == {}
    with pytest.raises(pl.ConfigError) as refused:
        CUDAAccelerator().setup_device(torch.device("cpu"))
    assert str(refused.value) == "CUDAAccelerator: expected a device such as 'cuda:0', found 'cpu'."
