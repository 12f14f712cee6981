"""Breast cancer from 30 measured numbers: a DataModule, metrics, a plateau schedule, averaged weights."""

import argparse
import os
from itertools import pairwise

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC


class CancerData(pl.LightningDataModule):
    """The rows, split and standardized by what the training rows say."""

    def __init__(self, batch_size: int = 32, seed: int = 3, val_share: float = 0.2):
        super().__init__()
        self.save_hyperparameters()
        self.mean = self.spread = None

    def prepare_data(self):
        load_breast_cancer()

    def setup(self, stage):
        features, labels = load_breast_cancer(return_X_y=True)
        features = torch.tensor(features, dtype=torch.float32)
        rows = TensorDataset(features, torch.tensor(labels, dtype=torch.float32))
        held_out = int(len(rows) * self.hparams.val_share)
        sizes = [len(rows) - 2 * held_out, held_out, held_out]
        split = torch.Generator().manual_seed(self.hparams.seed)
        self.train, self.val, self.test = random_split(rows, sizes, generator=split)
        if self.mean is None:
            known = features[self.train.indices]
            self.mean, self.spread = known.mean(0), known.std(0)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        features, labels = batch
        return (features - self.mean) / self.spread, labels

    def train_dataloader(self):
        order = torch.Generator().manual_seed(self.hparams.seed)
        return DataLoader(self.train, batch_size=self.hparams.batch_size, shuffle=True, generator=order)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=64)

    def test_dataloader(self):
        return [DataLoader(self.test, batch_size=64), DataLoader(self.val, batch_size=64)]

    def predict_dataloader(self):
        return DataLoader(self.test, batch_size=64)

    def state_dict(self):
        return {"mean": self.mean, "spread": self.spread}

    def load_state_dict(self, state_dict):
        self.mean, self.spread = state_dict["mean"], state_dict["spread"]


class TabularModel(pl.LightningModule):
    """A small network that tells malignant from benign."""

    def __init__(self, inputs: int = 30, hidden: tuple = (32, 16), lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        widths = [inputs, *hidden]
        layers = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        metrics = MetricCollection({"accuracy": BinaryAccuracy(), "auroc": BinaryAUROC()})
        self.val_metrics = metrics.clone(prefix="val_")

    def forward(self, features):
        return self.net(features).squeeze(1)

    def training_step(self, batch, batch_idx):
        features, labels = batch
        loss = functional.binary_cross_entropy_with_logits(self(features), labels)
        return {"loss": loss, "rows": len(labels)}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("rows", float(outputs["rows"]), on_step=False, on_epoch=True, reduce_fx="sum")

    def validation_step(self, batch, batch_idx):
        features, labels = batch
        scores = self(features)
        self.val_metrics.update(scores, labels.long())
        self.log("val_loss", functional.binary_cross_entropy_with_logits(scores, labels), prog_bar=True)

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        features, labels = batch
        self.log("test_loss", functional.binary_cross_entropy_with_logits(self(features), labels))

    def predict_step(self, batch, batch_idx):
        return torch.sigmoid(self(batch[0]))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    def configure_callbacks(self):
        return [EarlyStopping("val_loss", patience=6)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default=".")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    pl.seed_everything(17)
    data, model, begun = CancerData(), TabularModel(), []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        logger=CSVLogger(options.root, name="cancer", version="only"),
        log_every_n_steps=5,
        callbacks=[
            ModelCheckpoint(monitor="val_auroc", mode="max", filename="{epoch:02d}-{val_auroc:.4f}"),
            LambdaCallback(on_train_epoch_start=lambda trainer, module: begun.append(trainer.current_epoch)),
            Timer("00:01:00:00"),
        ],
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=data)
    torch.save(model.state_dict(), os.path.join(options.root, "weights.pt"))
    losses = trainer.test(model, datamodule=data, verbose=False)
    malignant = torch.cat(trainer.predict(model, datamodule=data))
    restored = CancerData.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    print(f"epochs={len(begun)} steps={trainer.global_step} batch_size={restored.hparams.batch_size}")
    print(" ".join(f"{name}={value:.6f}" for loss in losses for name, value in loss.items()))
    print(f"predicted={len(malignant)} mean={malignant.mean():.6f}")


if __name__ == "__main__":
    main()
