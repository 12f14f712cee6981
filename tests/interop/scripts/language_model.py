"""A character language model on the source of Python's standard library."""

import argparse
import json
import os

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


class Characters(Dataset):
    """Windows of ``length`` characters and the ones that follow them."""

    def __init__(self, text, alphabet, length):
        index = {character: position for position, character in enumerate(alphabet)}
        self.codes = torch.tensor([index[character] for character in text])
        self.length = length

    def __len__(self):
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, item):
        window = self.codes[item * self.length : (item + 1) * self.length + 1]
        return {"inputs": window[:-1], "targets": window[1:]}


class Block(nn.Module):
    """Causal attention and a small network, each behind a norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        rows, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(self.norms[1](x))


class CharacterModel(pl.LightningModule):
    """A small transformer; the weights of input and output are tied."""

    def __init__(self, alphabet: str, length: int = 32, width: int = 32, lr: float = 3e-3, warmup: int = 10):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(len(alphabet), width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(alphabet), bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs):
        x = self.embedding(inputs) + self.position[: inputs.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, batch):
        return functional.cross_entropy(self(batch["inputs"]).flatten(0, 1), batch["targets"].flatten())

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log_dict({"loss": loss, "bits": loss / 0.6931}, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch["inputs"]))

    def predict_step(self, batch, batch_idx):
        return self(batch["inputs"])[:, -1].argmax(1)

    def configure_optimizers(self):
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr)
        warmup = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / self.hparams.warmup)
        )
        return [optimizer], [{"scheduler": warmup, "interval": "step", "name": "warmup"}]

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        self.log("gradient_norm", norm)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default=".")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()

    pl.seed_everything(11)
    with open(json.__file__, encoding="utf-8") as file:
        text = file.read()
    alphabet = "".join(sorted(set(text)))
    cut = len(text) * 9 // 10
    order = torch.Generator().manual_seed(1)
    train = DataLoader(Characters(text[:cut], alphabet, 32), batch_size=8, shuffle=True, generator=order)
    val = DataLoader(Characters(text[cut:], alphabet, 32), batch_size=8)
    model = CharacterModel(alphabet)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        val_check_interval=0.5,
        gradient_clip_val=1.0,
        log_every_n_steps=5,
        logger=CSVLogger(options.root, name="characters", version=0),
        callbacks=[
            GradientAccumulationScheduler({0: 1, 1: 2}),
            ModelCheckpoint(monitor="val_loss", save_top_k=2, every_n_train_steps=10),
        ],
        enable_progress_bar=False,
    )
    trainer.fit(model, train, val)
    steps, val_loss = trainer.global_step, trainer.callback_metrics["val_loss"]
    torch.save(model.state_dict(), os.path.join(options.root, "weights.pt"))
    predictions = torch.cat(trainer.predict(model, val))
    print(f"steps={steps} val_loss={val_loss:.6f}")
    print("next=" + "".join(alphabet[code] for code in predictions.tolist())[:20].__repr__())


if __name__ == "__main__":
    main()
