"""The engine alone: FNGDPreconditioner puts the weighted gradient into p.grad, any torch optimizer takes the step.

A small network learns a function of two variables under three optimizers, with and without the engine. Run it with

    python examples/05_any_optimizer.py
"""

import torch
from torch import nn

from hf_fngd import FNGDPreconditioner

POINTS, EPOCHS, BATCH_SIZE = 1024, 20, 64

# What to step with. None of them knows about FNGD.
OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=3e-3),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


def train(make_optimizer, damping, inputs, targets):
    """Train a new network, on plain gradients where damping is None; returns the mean squared error of every epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = make_optimizer(model.parameters())
    preconditioner = None
    if damping is not None:
        # The weights of the Fisher matrix, solved for anew in every step; by default they go by norms alone.
        preconditioner = FNGDPreconditioner(model, sharing="never", damping=damping)
        # Sample weights belong to an optimizer step, so the engine has to hear of each. follow() registers a hook that
        # calls preconditioner.step() after every optimizer.step(): the loop below stays as it was.
        preconditioner.follow(optimizer)

    losses = []
    for _ in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(POINTS).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs[batch]), targets[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch) / POINTS
        losses.append(total)
    return losses


torch.manual_seed(0)
inputs = 4 * torch.rand(POINTS, 2) - 2
targets = torch.sin(2 * inputs[:, :1]) * torch.cos(inputs[:, 1:]) + 0.05 * torch.randn(POINTS, 1)

print(f"the variance of the targets, which is the error of a constant: {targets.var():.4f}\n")
print("optimizer          damping  first loss  last loss")
for name, make_optimizer in OPTIMIZERS.items():
    # The smaller the damping, the further the sample weights are from plain averaging, which is what None does.
    for damping in (None, 0.1):
        losses = train(make_optimizer, damping, inputs, targets)
        print(f"{name:18} {damping!s:7} {losses[0]:11.4f} {losses[-1]:10.4f}")
