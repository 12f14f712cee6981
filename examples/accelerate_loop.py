"""A Hugging Face Accelerate loop that may be killed at any instant.

    python examples/accelerate_loop.py    # or give another directory than runs/accelerate

Kill it in the middle of an epoch and give the same command again: it goes on with the batch it had not seen
yet, and ends with the very same weights, bit for bit, as a run that was never stopped.
"""

import hashlib
import sys

import torch
from accelerate import Accelerator, skip_first_batches
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from holdfast.checkpointer import Checkpointer

EPOCHS = 6

torch.manual_seed(0)
inputs = torch.randn(1600, 16)
dataset = TensorDataset(inputs, inputs.sin().sum(dim=1, keepdim=True))

model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=50)
order = torch.Generator()  # shuffles, so that the loader draws nothing from the generators of the model
loader = DataLoader(dataset, batch_size=32, shuffle=True, generator=order)

accelerator = Accelerator()
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

with Checkpointer((*sys.argv[1:], "runs/accelerate")[0], keep=3, every=20) as checkpointer:
    step = checkpointer.restore(state) or 0  # every process restores ...
    while step < EPOCHS * len(loader):
        epoch, done = divmod(step, len(loader))
        order.manual_seed(epoch)  # the order of an epoch depends on its number alone
        for batch, target in skip_first_batches(loader, done):
            loss = nn.functional.mse_loss(model(batch), target)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            step += 1
            if accelerator.is_main_process:  # ... and one saves
                checkpointer.save(step, state)
                if step % 10 == 0:
                    print(f"step {step}  loss {loss:.4f}", flush=True)

weights = accelerator.unwrap_model(model).state_dict().values()
digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in weights))
accelerator.print("sha256 of the final weights:", digest.hexdigest())
