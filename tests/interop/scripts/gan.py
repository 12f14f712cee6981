"""A GAN that learns a ring of eight clusters, with two optimizers stepped by hand."""

import argparse
import math
import os

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def mlp(inputs, hidden, outputs):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2),
        nn.Linear(hidden, outputs),
    )  # fmt: skip


class GAN(pl.LightningModule):
    """A generator and a discriminator, each with an optimizer and a schedule of its own."""

    def __init__(self, latent_dim: int = 8, hidden: int = 64, lr: float = 1e-3, critic_steps: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = mlp(latent_dim, hidden, 2)
        self.discriminator = mlp(2, hidden, 1)
        self.register_buffer("fixed_noise", torch.randn(64, latent_dim))

    def forward(self, noise):
        return self.generator(noise)

    def noise(self, like):
        return torch.randn(len(like), self.hparams.latent_dim, device=self.device)

    def adversarial_loss(self, scores, real):
        target = torch.full_like(scores, float(real))
        return functional.binary_cross_entropy_with_logits(scores, target)

    def training_step(self, batch, batch_idx):
        (points,) = batch
        generator_optimizer, discriminator_optimizer = self.optimizers()

        self.toggle_optimizer(discriminator_optimizer)
        real = self.adversarial_loss(self.discriminator(points), True)
        fake = self.adversarial_loss(self.discriminator(self(self.noise(points)).detach()), False)
        discriminator_loss = (real + fake) / 2
        discriminator_optimizer.zero_grad()
        self.manual_backward(discriminator_loss)
        self.clip_gradients(discriminator_optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        discriminator_optimizer.step()
        self.untoggle_optimizer(discriminator_optimizer)
        self.log("discriminator_loss", discriminator_loss, prog_bar=True)

        if (batch_idx + 1) % self.hparams.critic_steps == 0:
            self.toggle_optimizer(generator_optimizer)
            generator_loss = self.adversarial_loss(self.discriminator(self(self.noise(points))), True)
            generator_optimizer.zero_grad()
            self.manual_backward(generator_loss)
            generator_optimizer.step()
            self.untoggle_optimizer(generator_optimizer)
            self.log("generator_loss", generator_loss, prog_bar=True)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()
        radius = self(self.fixed_noise).norm(dim=1).mean()
        self.log("radius", radius)

    def configure_optimizers(self):
        betas = (0.5, 0.9)
        generator = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=betas)
        discriminator = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr, betas=betas)
        schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in (generator, discriminator)]
        return [generator, discriminator], schedules


class Radii(Callback):
    """Remembers how far out the generated points lie, epoch by epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        with torch.no_grad():
            self.seen.append(pl_module(pl_module.fixed_noise).norm(dim=1).mean().item())

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = list(state_dict["seen"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default=".")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    pl.seed_everything(5)
    angles = torch.randint(8, (2048,)) * math.pi / 4
    ring = torch.stack([angles.cos(), angles.sin()], dim=1) * 2 + 0.05 * torch.randn(2048, 2)
    loader = DataLoader(TensorDataset(ring), batch_size=64, shuffle=True, drop_last=True)
    model, radii = GAN(), Radii()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        logger=False,
        default_root_dir=options.root,
        callbacks=[radii, ModelCheckpoint(dirpath=os.path.join(options.root, "kept"), save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    torch.save(model.state_dict(), os.path.join(options.root, "weights.pt"))
    print(f"steps={trainer.global_step} files={len(os.listdir(os.path.join(options.root, 'kept')))}")
    print("radii=" + " ".join(f"{radius:.6f}" for radius in radii.seen))


if __name__ == "__main__":
    main()
