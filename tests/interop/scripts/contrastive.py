"""Contrastive learning with a momentum encoder and a queue of negatives, in the manner of MoCo."""

import argparse
import copy
import os

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def encoder(width, outputs):
    return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, outputs))


class MomentumContrast(pl.LightningModule):
    """Two encoders: one is trained, the other follows it slowly after every batch."""

    def __init__(self, width=128, outputs=32, queue_size=256, momentum=0.99, temperature=0.2, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.query = encoder(width, outputs)
        self.key = copy.deepcopy(self.query)
        self.key.requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(queue_size, outputs), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self._new_keys = None

    def forward(self, images):
        return functional.normalize(self.query(images), dim=1)

    @staticmethod
    def view(images):
        """Another look at the same images: noise, and some pixels left out."""
        kept = (torch.rand_like(images) > 0.2).to(images.dtype)
        return (images + 0.1 * torch.randn_like(images)) * kept

    def training_step(self, batch, batch_idx):
        images, _ = batch
        queries = self(self.view(images))
        with torch.no_grad():
            keys = functional.normalize(self.key(self.view(images)), dim=1)
        positive = (queries * keys).sum(1, keepdim=True)
        negative = queries @ self.queue.clone().T
        scores = torch.cat([positive, negative], dim=1) / self.hparams.temperature
        loss = functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))
        self._new_keys = keys
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("hit", (scores.argmax(1) == 0).float().mean(), on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.hparams.momentum)
            start, count = int(self.pointer), len(self._new_keys)
            places = torch.arange(start, start + count) % self.hparams.queue_size
            self.queue[places] = self._new_keys
            self.pointer.fill_((start + count) % self.hparams.queue_size)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["queue_rows"] = self.hparams.queue_size

    def on_load_checkpoint(self, checkpoint):
        assert checkpoint["queue_rows"] == self.hparams.queue_size

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.query.parameters(), lr=self.hparams.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class NearestNeighbour(Callback):
    """How many digits have a neighbour of their own kind, as the encoder sees them."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.shares = []

    def on_train_epoch_end(self, trainer, pl_module):
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            codes = pl_module(self.images)
            likeness = codes @ codes.T
            likeness.fill_diagonal_(-1.0)
            share = (self.labels[likeness.argmax(1)] == self.labels).float().mean()
        pl_module.train(was_training)
        self.shares.append(share.item())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default=".")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    pl.seed_everything(13)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)
    neighbours = NearestNeighbour(images[:500], labels[:500])
    model = MomentumContrast()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        default_root_dir=options.root,
        logger=False,
        callbacks=[neighbours],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    trainer.save_checkpoint(os.path.join(options.root, "last.ckpt"))
    torch.save(model.state_dict(), os.path.join(options.root, "weights.pt"))
    again = MomentumContrast.load_from_checkpoint(os.path.join(options.root, "last.ckpt"))
    print(f"steps={trainer.global_step} same={torch.equal(again.queue, model.queue)}")
    print("shares=" + " ".join(f"{share:.3f}" for share in neighbours.shares))


if __name__ == "__main__":
    main()
