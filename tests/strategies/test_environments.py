"""What launchers say about a job: the same answers as Lightning's environments, from the same variables."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest

from holdfast.errors import ConfigError
from holdfast.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, which are none of our business

LAUNCHERS = ("SLURM_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "NODE_", "TORCHELASTIC_")
SLURM = {
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
    "SLURM_NODELIST": "node[5-8,10],other",
}
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


def answers(environment: Any) -> tuple[Any, ...]:
    return (
        environment.detect(), environment.creates_processes_externally, environment.main_address,
        environment.main_port, environment.world_size(), environment.global_rank(), environment.local_rank(),
        environment.node_rank(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("SLURMEnvironment", SLURM, (True, True, "node5", 19567, 8, 5, 1, 2)),
        (
            "SLURMEnvironment",
            {**SLURM, "MASTER_PORT": "7", "MASTER_ADDR": "a"},
            (True, True, "a", 7, 8, 5, 1, 2),
        ),
        ("SLURMEnvironment", {**SLURM, "SLURM_JOB_NAME": "bash"}, (False, True, "node5", 19567, 8, 5, 1, 2)),
        ("TorchElasticEnvironment", TORCHRUN, (True, True, "10.0.0.1", 4711, 8, 5, 1, 2)),
        (
            "LightningEnvironment",
            {"MASTER_PORT": "4711", "LOCAL_RANK": "1", "NODE_RANK": "2"},
            (True, True, "127.0.0.1", 4711, 1, 0, 1, 2),
        ),
        (
            "LightningEnvironment",
            {"MASTER_PORT": "4711", "MASTER_ADDR": "b", "GROUP_RANK": "3"},
            (True, False, "b", 4711, 1, 0, 0, 3),
        ),
    ],
)
def test_answers(
    name: str, variables: dict[str, str], expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    for package in ("holdfast.plugins.environments", "lightning.pytorch.plugins.environments"):
        assert answers(getattr(importlib.import_module(package), name)()) == expected, package


def test_nothing_is_detected_without_a_launcher() -> None:
    assert [SLURMEnvironment.detect(), TorchElasticEnvironment.detect()] == [False, False]
    assert LightningEnvironment.detect()


@pytest.mark.parametrize(
    "nodes", ["alpha,beta,gamma", "alpha", "1.2.3.0", "host[22]", "host[1-5,7-9]", "a b"]
)
def test_the_first_machine_of_a_list(nodes: str) -> None:
    from lightning.pytorch.plugins.environments import SLURMEnvironment as Theirs

    assert SLURMEnvironment.resolve_root_node_address(nodes) == Theirs.resolve_root_node_address(nodes)


def test_without_a_launcher_the_script_says_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = LightningEnvironment()
    environment.set_world_size(4)
    environment.set_global_rank(3)
    assert (environment.world_size(), environment.global_rank()) == (4, 3)
    assert environment.main_port == environment.main_port > 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    environment.teardown()
    assert "WORLD_SIZE" not in os.environ


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (SLURMEnvironment.job_id(), SLURMEnvironment.job_name()) == (None, None)
    for variable, value in SLURM.items():
        monkeypatch.setenv(variable, value)
    assert (SLURMEnvironment.job_id(), SLURMEnvironment.job_name()) == (1234567, "train")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert SLURMEnvironment.job_id() is None


def test_settings_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    TorchElasticEnvironment().validate_settings(num_devices=4, num_nodes=2)
    with pytest.raises(ConfigError) as refused:
        TorchElasticEnvironment().validate_settings(num_devices=2, num_nodes=2)
    assert str(refused.value) == (
        "torchrun started 8 processes, but Trainer(devices=2, num_nodes=2) means 4. Make them equal."
    )
    with pytest.raises(ConfigError) as refused:
        TorchElasticEnvironment().validate_settings(num_devices=1, num_nodes=1)
    assert str(refused.value) == (
        "torchrun started 8 processes, but Trainer(devices=1, num_nodes=1) means 1. Make them equal, or use "
        "strategy='single_device' for a run of this process alone."
    )
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    SLURMEnvironment().validate_settings(num_devices=4, num_nodes=2)
    with pytest.raises(ConfigError) as refused:
        SLURMEnvironment().validate_settings(num_devices=4, num_nodes=1)
    assert str(refused.value) == "Trainer(num_nodes=1) differs from SLURM's SLURM_NNODES=2. Make them equal."
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ConfigError) as refused:
        SLURMEnvironment().validate_settings(num_devices=2, num_nodes=2)
    assert str(refused.value) == (
        "SLURM started 8 tasks, but Trainer(devices=2, num_nodes=2) means 4. Make them equal."
    )


def test_machines_that_nobody_connects() -> None:
    LightningEnvironment().validate_settings(num_devices=4, num_nodes=1)
    with pytest.raises(ConfigError) as refused:
        LightningEnvironment().validate_settings(num_devices=4, num_nodes=2)
    assert str(refused.value) == (
        "Trainer(num_nodes=2): MASTER_ADDR and MASTER_PORT are to say where rank 0 is, and NODE_RANK which "
        "machine this is. Set them on each machine, or start the job with torchrun or srun."
    )
