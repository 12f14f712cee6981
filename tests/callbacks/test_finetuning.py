"""Frozen parts stay frozen until their epoch, and a run goes on with the groups and flags that it had."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

import holdfast as pl
from holdfast.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
from holdfast.errors import CheckpointIncompatible, ConfigError
from tests.training.toys import Toy, rows, trainer

from .resumes import resume_everywhere


class Net(pl.LightningModule):
    def __init__(self, schedules: bool = False, everything: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.head = nn.Linear(2, 1)
        self.schedules = schedules
        self.everything = everything

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch[0])).square().mean()

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad or self.everything]
        optimizer = SGD(parameters, lr=0.1, momentum=0.9)
        return [optimizer], [StepLR(optimizer, 1, 0.5)] if self.schedules else []


class LayerByLayer(BaseFinetuning):
    """Unfreezes the last layer in epoch 1 and the first two in epoch 2."""

    def __init__(self, train_bn: bool = True) -> None:
        super().__init__()
        self.train_bn = train_bn

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[2], optimizer, train_bn=self.train_bn)
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[:2], optimizer, lr=0.02)


@pytest.mark.parametrize("schedules", [False, True])
def test_a_backbone_goes_on_exactly(schedules: bool, tmp_path: Path) -> None:
    runs = resume_everywhere(
        tmp_path,
        lambda: Net(schedules),
        lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.2)],
        lambda: rows(shuffle=True),
        max_epochs=4,
    )
    assert all(len(run.optimizers[0].param_groups) == 2 for run in runs)
    assert all(parameter.requires_grad for run in runs for parameter in run.lightning_module.parameters())


@pytest.mark.parametrize("train_bn", [True, False])
def test_layers_unfrozen_one_after_the_other_go_on_exactly(train_bn: bool, tmp_path: Path) -> None:
    runs = resume_everywhere(
        tmp_path, Net, lambda: [LayerByLayer(train_bn)], lambda: rows(shuffle=True), max_epochs=4
    )
    for run in runs:
        assert [len(group["params"]) for group in run.optimizers[0].param_groups] == (
            [4, 2, 2] if train_bn else [2, 2, 4]
        )
        assert run.lightning_module.backbone[1].track_running_stats


def test_batch_norms_that_do_not_track_yet_go_on_exactly(tmp_path: Path) -> None:
    runs = resume_everywhere(tmp_path, Net, lambda: [LayerByLayer(False)], rows, max_epochs=2)
    assert not any(run.lightning_module.backbone[1].track_running_stats for run in runs)


def test_groups_added_in_another_hook_are_there_again(tmp_path: Path) -> None:
    class InTheMiddle(LayerByLayer):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            pass

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1:
                self.unfreeze_and_add_param_group(pl_module.backbone, trainer.optimizers[0])

    resume_everywhere(tmp_path, Net, lambda: [InTheMiddle()], rows, max_epochs=2)


def test_two_optimizers_get_their_own_groups_back(tmp_path: Path) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.body = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.manual_backward(self.body(self.head(self.backbone(batch[0]))).square().mean())
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return SGD(self.head.parameters(), lr=0.1), Adam(self.body.parameters(), lr=0.01)

    class OnlyAdam(LayerByLayer):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if isinstance(optimizer, Adam):
                super().finetune_function(pl_module, epoch, optimizer)

    runs = resume_everywhere(tmp_path, Two, lambda: [OnlyAdam()], rows, max_epochs=3)
    assert all([len(one.param_groups) for one in run.optimizers] == [1, 3] for run in runs)


def test_evaluating_freezes_nothing() -> None:
    net = Net()
    trainer(callbacks=LayerByLayer()).predict(_Predicts(net), rows(), return_predictions=False)
    assert all(parameter.requires_grad for parameter in net.parameters())


class _Predicts(pl.LightningModule):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.backbone, self.head = net.backbone, net.head

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head(self.backbone(batch[0]))


def test_rates_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    finetuning = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.0123, verbose=True, rounding=3
    )
    trainer(callbacks=finetuning, max_epochs=3).fit(Net(), rows())
    said = [line for line in capsys.readouterr().err.splitlines() if "backbone" in line]
    assert said == [
        "epoch 1: learning rate 0.1, the backbone's 0.012",
        "epoch 2: learning rate 0.1, the backbone's 0.025",
    ]


def test_an_optimizer_that_has_the_frozen_already_is_named() -> None:
    message = (
        "4 of 4 unfrozen parameters are in the optimizer already and stay in their group. Make it of what is "
        "not frozen: SGD(filter(lambda p: p.requires_grad, self.parameters()), ...)."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        trainer(callbacks=BackboneFinetuning(unfreeze_backbone_at_epoch=0)).fit(Net(everything=True), rows())


def test_a_module_without_a_backbone_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        trainer(callbacks=BackboneFinetuning()).fit(Toy(), rows())
    assert str(caught.value) == (
        "BackboneFinetuning freezes self.backbone, but Toy has no module of that name. Call it that, or "
        "derive from BaseFinetuning."
    )


def test_what_has_to_be_defined_is_named() -> None:
    class Half(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            pass

    with pytest.raises(NotImplementedError) as caught:
        trainer(callbacks=BaseFinetuning()).fit(Net(), rows())
    assert str(caught.value) == "BaseFinetuning must define freeze_before_training(pl_module)."
    with pytest.raises(NotImplementedError) as caught:
        trainer(callbacks=Half()).fit(Net(), rows())
    assert str(caught.value) == "Half must define finetune_function(pl_module, epoch, optimizer)."


def test_a_group_of_a_parameter_that_is_gone_is_named(tmp_path: Path) -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(3, 2)
            self.strict_loading = False

    first = trainer(callbacks=LayerByLayer(), max_epochs=2)
    first.fit(Net(), rows())
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(callbacks=LayerByLayer(), max_epochs=3)
    with pytest.raises(CheckpointIncompatible) as caught:
        again.fit(Other(), rows(), ckpt_path=tmp_path / "a.ckpt")
    assert str(caught.value) == (
        "In the checkpoint LayerByLayer had given optimizer 0 the parameter 'backbone.1.weight', which Other "
        "does not have. Resume with the model that the run was started with."
    )


def test_the_state_has_lightnings_form() -> None:
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=0)
    trainer(callbacks=finetuning).fit(Net(), rows())
    state = finetuning.state_dict()
    assert [group["params"] for group in state["internal_optimizer_metadata"][0]] == [
        ["backbone.1.weight", "backbone.1.bias", "head.weight", "head.bias"],
        ["backbone.0.weight", "backbone.0.bias", "backbone.2.weight", "backbone.2.bias"],
    ]
    assert state["previous_backbone_lr"] == pytest.approx(0.01)
    assert state["untracked_batch_norms"] == []
    again = BackboneFinetuning()
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert torch.is_tensor(state["internal_optimizer_metadata"][0][0]["params"][0]) is False
