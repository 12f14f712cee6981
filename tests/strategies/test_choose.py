"""strategy=, accelerator=, devices=, num_nodes=: every spelling, and what each refusal says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import holdfast as pl
from holdfast.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator, MPSAccelerator
from holdfast.accelerators.base import parse_indices
from holdfast.errors import ArgumentError
from holdfast.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from holdfast.strategies.choose import choose_strategy
from holdfast.strategies.environments import LightningEnvironment
from holdfast.strategies.fsdp import FSDPStrategy
from holdfast.utilities.rank_zero import rank_zero_only


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
            {"accelerator": "cpu", "devices": 2, "strategy": "single_device"},
            "Trainer(strategy='single_device', devices=2): it takes one. Use strategy='ddp'.",
        ),
        (
            {"strategy": DDPStrategy(parallel_devices=[torch.device("cpu")]), "devices": 2},
            "Trainer(devices=2) and DDPStrategy(parallel_devices=...) both say which devices. Leave one out.",
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
        (
            {"num_nodes": 2},
            "Trainer(num_nodes=2): MASTER_ADDR and MASTER_PORT are to say where rank 0 is, and NODE_RANK which "
            "machine this is. Set them on each machine, or start the job with torchrun or srun.",
        ),
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
            "Trainer(strategy='dpp'): expected 'auto', 'single_device', 'ddp', 'fsdp', or a Strategy. Did you mean "
            "'ddp'?",
        ),
        (
            {"strategy": "deepspeed_stage_2"},
            "Trainer(strategy='deepspeed_stage_2') is not supported. Use strategy='fsdp'.",
        ),
        (
            {"strategy": "dp"},
            "Trainer(strategy='dp') is not supported. It was replaced by 'ddp' in Lightning 2. Use strategy='ddp'.",
        ),
        (
            {"strategy": "horovod"},
            "Trainer(strategy='horovod') is not supported. Use strategy='ddp'.",
        ),
        (
            {"strategy": "colossalai"},
            "Trainer(strategy='colossalai') is not supported. Use strategy='fsdp'.",
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
    for many, indices in {2: [0, 1], -1: [0, 1, 2, 3], "0, 1": [0, 1], "3,1": [3, 1]}.items():
        strategy = choose_strategy("auto", "gpu", many)
        assert type(strategy) is DDPStrategy
        assert strategy.parallel_devices == [torch.device("cuda", index) for index in indices]
    assert len(choose_strategy("ddp", "gpu").parallel_devices) == 4
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_strategy("ddp", "gpu", [3, 2]).root_device == torch.device("cuda", 2)


def test_a_gpu_of_its_own_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    started_by_torchrun(monkeypatch, rank=1, processes=2)
    assert choose_strategy().root_device == torch.device("cuda", 0)


def started_by_torchrun(
    monkeypatch: pytest.MonkeyPatch, rank: int, processes: int, machines: int = 1
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    here = processes // machines
    for name, value in {
        "RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here,
        "GROUP_RANK": rank // here,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))


def test_what_torchrun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started_by_torchrun(monkeypatch, rank=5, processes=6, machines=2)
    for arguments in ({}, {"devices": 3}, {"strategy": "ddp"}, {"strategy": DDPStrategy()}):
        strategy: Any = choose_strategy(accelerator="cpu", num_nodes=2, **arguments)
        assert type(strategy) is DDPStrategy
        assert (strategy.global_rank, strategy.local_rank, strategy.node_rank) == (5, 2, 1)
        assert (strategy.world_size, strategy.num_nodes, len(strategy.parallel_devices)) == (6, 2, 3)
        assert strategy.is_global_zero is False
    with pytest.raises(pl.ConfigError) as refused:
        choose_strategy(accelerator="cpu")
    assert str(refused.value) == (
        "torchrun started 6 processes, but Trainer(devices=3, num_nodes=1) means 3. Make them equal."
    )
    assert type(choose_strategy("single_device", accelerator="cpu")) is SingleDeviceStrategy


def test_what_slurm_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    for name, value in {
        "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NNODES": "2",
        "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    strategy: Any = choose_strategy(accelerator="cpu", num_nodes=2)
    assert type(strategy) is DDPStrategy
    assert (strategy.global_rank, strategy.world_size, len(strategy.parallel_devices)) == (3, 4, 2)
    environment = LightningEnvironment()
    assert type(choose_strategy(accelerator="cpu", environment=environment)) is SingleDeviceStrategy


def test_options_by_name() -> None:
    assert choose_strategy("ddp", "cpu", 2)._options == {}  # type: ignore[attr-defined]
    for end, value in (("true", True), ("false", False)):
        name = f"ddp_find_unused_parameters_{end}"
        assert choose_strategy(name, "cpu", 2)._options == {"find_unused_parameters": value}  # type: ignore[attr-defined]


def test_starts_that_are_ddps() -> None:
    for name in ("ddp_spawn", "ddp_fork_find_unused_parameters_true", "ddp_notebook"):
        start = "_".join(name.split("_")[:2])
        expected = (
            f"Trainer(strategy='{start}') is started as 'ddp' is: by running this process's command again. Use "
            "strategy='ddp'."
        )
        with pytest.warns(UserWarning, match=f"^{re.escape(expected)}$"):
            first = choose_strategy(name, "cpu", 2)
        assert type(first) is type(choose_strategy(name, "cpu", 2)) is DDPStrategy


def test_fsdp_by_name() -> None:
    strategy: Any = choose_strategy("fsdp", "cpu", 2)
    assert (type(strategy), strategy.world_size) == (FSDPStrategy, 2)


def test_strategies_as_objects() -> None:
    cpus = [torch.device("cpu")] * 3
    strategy: Any = choose_strategy(DDPStrategy(CPUAccelerator(), parallel_devices=cpus))
    assert (strategy.parallel_devices, strategy.world_size) == (cpus, 3)
    strategy = choose_strategy(DDPStrategy(find_unused_parameters=True), accelerator="cpu", devices=2)
    assert (strategy.world_size, type(strategy.accelerator)) == (2, CPUAccelerator)


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
