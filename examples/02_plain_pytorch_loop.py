"""FNGD in a loop of your own: what to call, and what can be seen.

A small network learns to tell three interleaved spirals apart. Run it with

    python examples/02_plain_pytorch_loop.py
"""

import math

import torch
from torch import nn

from hf_fngd import FNGD

ARMS, POINTS, EPOCHS, BATCH_SIZE = 3, 1536, 30, 64


def make_spirals(count):
    """Points [count, 2] on three spirals with a little noise, and the number of the spiral of each, [count]."""
    arm = torch.randint(ARMS, (count,))
    radius = torch.rand(count).sqrt()
    angle = 2 * math.pi * (arm / ARMS + radius) + 0.15 * torch.randn(count)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1), arm


torch.manual_seed(0)
points, arms = make_spirals(POINTS)
model = nn.Sequential(
    nn.Linear(2, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, ARMS)
)

# FNGD is an ordinary torch optimizer, so schedulers and clipping work as they do with any other.
optimizer = FNGD(model, lr=5e-3, sharing="ranked")  # weights of the Fisher matrix; the default goes by norms alone
steps = EPOCHS * (POINTS // BATCH_SIZE)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

print("epoch   loss  phase  weight spread     rho  lambda")
for epoch in range(1, EPOCHS + 1):
    total = 0.0
    for batch in torch.randperm(POINTS).split(BATCH_SIZE):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(points[batch]), arms[batch])
        loss.backward()  # from here on p.grad is the preconditioned gradient
        optimizer.step()
        schedule.step()
        total += loss.item() * len(batch) / POINTS

    if epoch <= 2 or epoch % 5 == 0:
        # Read before the next zero_grad: lambda is measured on the gradients that are still there. A spread of 0
        # would be plain averaging; rho is the gradient noise scale, large where the samples disagree.
        seen = optimizer.diagnostics()
        print(
            f"{epoch:5d} {total:6.3f} {seen['phase']:6.0f} {seen['weight_spread']:14.3f} {seen['rho']:7.1f}"
            f" {seen['lambda']:7.1e}"
        )

    # In the first epoch (phase 0) every step computes the weights of the samples, in later ones (phase 1) they are
    # shared and computed anew in one step of `refresh`. Only this loop knows where an epoch ends: it has to say so.
    optimizer.end_epoch()

# Complete once a step was done, since only a call shows whether a layer gets one row per sample. Norms have no
# matrix to precondition: their gradient stays as it is.
print(f"\n{optimizer.coverage()}")

model.eval()
test_points, test_arms = make_spirals(1000)
accuracy = (model(test_points).argmax(dim=1) == test_arms).float().mean()
print(f"\naccuracy on points that it has not seen: {accuracy:.3f} (guessing: {1 / ARMS:.3f})")
