"""FNGD in a loop of your own: what to call, and what can be seen.

A small network learns to tell three interleaved spirals apart. Run it with

    python examples/02_plain_pytorch_loop.py
"""

import math

import torch
from torch import nn

from hf_fngd import FNGD

ARMS, POINTS, EPOCHS, BATCH_SIZE = 3, 1536, 20, 64


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
optimizer = FNGD(model, lr=5e-3)  # the model, not its parameters: FNGD has to see the layers
steps = EPOCHS * (POINTS // BATCH_SIZE)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

print("epoch   loss  weight spread")
for epoch in range(1, EPOCHS + 1):
    total = 0.0
    for batch in torch.randperm(POINTS).split(BATCH_SIZE):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(points[batch]), arms[batch])
        loss.backward()  # from here on p.grad is the weighted sum of the samples' gradients
        optimizer.step()
        schedule.step()
        total += loss.item() * len(batch) / POINTS

    if epoch <= 2 or epoch % 5 == 0:
        # How far the sample weights are apart: 0 is plain averaging.
        print(f"{epoch:5d} {total:6.3f} {optimizer.diagnostics()['weight_spread']:14.3f}")

    # Only this loop knows where an epoch ends. sharing="replay" has to be told; all others do not mind.
    optimizer.end_epoch()

# Which parameters are weighed and which are not. Read it after a step: only a call shows a layer's inputs.
print(f"\n{optimizer.coverage()}")

model.eval()
test_points, test_arms = make_spirals(1000)
accuracy = (model(test_points).argmax(dim=1) == test_arms).float().mean()
print(f"\naccuracy on points that it has not seen: {accuracy:.3f} (guessing: {1 / ARMS:.3f})")
