"""Train a small character GPT on the source of Python's own standard library, then let it write some.

    python examples/chargpt.py            # some minutes on two cores
    python examples/chargpt.py --quick    # some seconds: small model, little text

Kill it and give the same command again: it goes on. The three best models by validation loss are kept; the
text at the end comes from the best of them, loaded back from its checkpoint.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import holdfast as pl
from holdfast.callbacks import ModelCheckpoint

VOCABULARY = "\n" + "".join(map(chr, range(32, 127))) + "?"  # the last one stands for everything else


def standard_library_text(limit: int) -> str:
    """The first ``limit`` characters of the standard library's top-level modules, in order of their names."""
    pieces: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        pieces.append(path.read_text(encoding="utf-8", errors="replace").expandtabs(4))
        size += len(pieces[-1])
        if size >= limit:
            break
    return "".join(pieces)[:limit]


def encode(text: str) -> Tensor:
    """Characters to their numbers in the vocabulary."""
    number = {character: i for i, character in enumerate(VOCABULARY[:-1])}
    return torch.tensor([number.get(character, len(VOCABULARY) - 1) for character in text])


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Pieces of ``block`` characters and the same moved on by one; ``jitter`` starts each a bit later."""

    def __init__(self, data: Tensor, block: int, jitter: bool) -> None:
        self.data, self.block, self.jitter = data, block, jitter

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.block - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block
        if self.jitter:
            start += int(torch.randint(self.block, ()))
        piece = self.data[start : start + self.block + 1]
        return piece[:-1], piece[1:]


class StandardLibrary(pl.LightningDataModule):
    """Real text that every machine with Python has: nine tenths to train on, the rest to validate with."""

    def __init__(self, characters: int, block: int, batch_size: int, workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        data = encode(standard_library_text(self.hparams.characters))
        cut = len(data) * 9 // 10
        self.train_set = Windows(data[:cut], self.hparams.block, jitter=True)
        self.val_set = Windows(data[cut:], self.hparams.block, jitter=False)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_set, self.hparams.batch_size, shuffle=True, num_workers=self.hparams.workers
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, self.hparams.batch_size, num_workers=self.hparams.workers)


class Block(nn.Module):
    """Attention to what came before, then a small network on each position; both added to their input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class CharGPT(pl.LightningModule):
    """A GPT over characters, with the embedding tied to the output layer."""

    def __init__(
        self,
        vocabulary: str,
        block: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
        lr: float = 2e-3,
        total_steps: int = 1000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.token = nn.Embedding(len(vocabulary), width)
        self.position = nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(vocabulary), bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character, (batch, seq, vocabulary), for tokens (batch, seq)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(places))))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.1
        )
        total, warmup = self.hparams.total_steps, max(1, self.hparams.total_steps // 20)

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def write(self, prompt: str, length: int, temperature: float = 0.8, seed: int = 0) -> str:
        """Go on from ``prompt`` for ``length`` characters, each drawn from what the model expects next."""
        generator = torch.Generator().manual_seed(seed)
        tokens = encode(prompt)[None].to(self.device)
        for _ in range(length):
            logits = self(tokens[:, -self.hparams.block :])[0, -1] / temperature
            drawn = torch.multinomial(logits.softmax(0).cpu(), 1, generator=generator)
            tokens = torch.cat([tokens, drawn.to(tokens.device)[None]], dim=1)
        return "".join(self.hparams.vocabulary[i] for i in tokens[0].tolist())


def parse_arguments() -> argparse.Namespace:
    """The command line; --quick changes only the defaults, so that it can be refined further."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small model, little text: seconds, not minutes")
    quick = parser.parse_known_args()[0].quick
    parser.add_argument("--root", type=Path, default=Path("runs/chargpt"))
    parser.add_argument("--steps", type=int, default=200 if quick else 1000)
    parser.add_argument("--validate-every", type=int, default=50 if quick else 100, metavar="STEPS")
    parser.add_argument("--characters", type=int, default=200_000 if quick else 2_000_000)
    parser.add_argument("--batch-size", type=int, default=16 if quick else 32)
    parser.add_argument("--block", type=int, default=64 if quick else 128, help="characters seen at a time")
    parser.add_argument("--width", type=int, default=64 if quick else 128)
    parser.add_argument("--layers", type=int, default=2 if quick else 4)
    parser.add_argument("--precision", default="32-true", help="32-true or bf16-mixed")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--sample", type=int, default=500, help="characters to write at the end")
    return parser.parse_args()


def main() -> None:
    """Train, or go on training, and sample from the best model."""
    args = parse_arguments()
    pl.seed_everything(1, workers=True)
    data = StandardLibrary(args.characters, args.block, args.batch_size, args.workers)
    model = CharGPT(VOCABULARY, args.block, width=args.width, layers=args.layers, total_steps=args.steps)
    best = ModelCheckpoint(
        monitor="val_loss", save_top_k=3, save_last=True, filename="{step}-{val_loss:.3f}", verbose=True
    )
    trainer = pl.Trainer(
        default_root_dir=args.root,
        max_steps=args.steps,
        val_check_interval=args.validate_every,
        check_val_every_n_epoch=None,
        limit_val_batches=20,
        gradient_clip_val=1.0,
        precision=args.precision,
        log_every_n_steps=10,
        callbacks=[best],
    )
    trainer.fit(model, datamodule=data, ckpt_path="auto")

    print(f"best model: {best.best_model_path} (val_loss {float(best.best_model_score):.3f})")
    writer = CharGPT.load_from_checkpoint(best.best_model_path).eval()
    print(f"what it writes after {args.prompt!r}:\n")
    print(writer.write(args.prompt, args.sample))


if __name__ == "__main__":
    main()
