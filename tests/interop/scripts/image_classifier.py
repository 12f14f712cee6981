"""Handwritten digits, augmented as they are read, classified by a small residual network."""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy


class Digits(Dataset):
    """Digits as images (1, 8, 8), moved about and made noisy for training."""

    def __init__(self, rows, augment=False):
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images[rows], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.labels = torch.tensor(labels[rows])
        self.augment = augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.augment:
            shift = torch.randint(-1, 2, (2,)).tolist()
            image = torch.roll(image, shift, dims=(1, 2)) + 0.05 * torch.randn(1, 8, 8)
        return image, self.labels[index]


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)])

    def forward(self, x):
        y = functional.relu(self.norms[0](self.first(x)))
        return functional.relu(x + self.norms[1](self.second(y)))


class Classifier(pl.LightningModule):
    """A residual network with a OneCycle schedule."""

    def __init__(self, channels=16, lr=0.02, weight_decay=1e-4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            Block(channels),
            nn.MaxPool2d(2),
            Block(channels),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(channels * 16, 10),
        )
        self.val_accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels, label_smoothing=0.05)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        scores = self(images)
        self.val_accuracy(scores, labels)
        self.log("val_loss", functional.cross_entropy(scores, labels))
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default=".")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    pl.seed_everything(7)
    train = DataLoader(Digits(slice(0, 1300), augment=True), batch_size=32, shuffle=True)
    val = DataLoader(Digits(slice(1300, 1500)), batch_size=100)
    test = DataLoader(Digits(slice(1500, None)), batch_size=100)
    best = ModelCheckpoint(
        monitor="val_accuracy",
        mode="max",
        save_top_k=2,
        filename="{epoch}-{val_accuracy:.3f}",
        save_last=True,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=CSVLogger(options.root, name="digits"),
        callbacks=[best, EarlyStopping("val_loss", patience=3), LearningRateMonitor("step")],
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), train, val)
    result = trainer.test(dataloaders=test, ckpt_path="best", verbose=False)[0]
    again = Classifier.load_from_checkpoint(best.best_model_path)
    trainer.validate(again, val, verbose=False)
    print(f"kept={len(best.best_k_models)} val_accuracy={trainer.callback_metrics['val_accuracy']:.3f}")
    print(f"steps={trainer.global_step} test_accuracy={result['test_accuracy']:.3f}")


if __name__ == "__main__":
    main()
