"""A training loop in plain PyTorch that may be killed at any instant.

    python examples/raw_loop.py    # or give another directory than runs/raw

Kill it however you like and give the same command again: it goes on from its newest whole checkpoint and ends
with the very same weights, bit for bit, as a run that was never stopped.
"""

import hashlib
import sys

import torch
from torch import nn

from holdfast.checkpointer import Checkpointer

STEPS = 600

torch.manual_seed(0)
inputs = torch.randn(1000, 16)
targets = inputs.sin().sum(dim=1, keepdim=True)

model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)

# All that changes while training. The random numbers that dropout and randint draw are saved as well.
state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

with Checkpointer((*sys.argv[1:], "runs/raw")[0], keep=3, every=50) as checkpointer:
    step = checkpointer.restore(state) or 0  # 0: there is no checkpoint yet
    while step < STEPS:
        rows = torch.randint(len(inputs), (32,))
        loss = nn.functional.mse_loss(model(inputs[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        step += 1
        checkpointer.save(step, state, metrics={"loss": loss})  # writes at every 50th step only
        if step % 10 == 0:
            print(f"step {step}  loss {loss:.4f}", flush=True)

weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
print("sha256 of the final weights:", hashlib.sha256(weights).hexdigest())
