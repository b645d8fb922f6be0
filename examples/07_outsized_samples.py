"""What the sample weights are for: a few samples whose gradients are outsized.

A small network learns prices from eight features, but one row in a hundred has its price in cents. The optimizers see
these rows like all others; the error is taken on rows in one unit. Run it with

    python examples/07_outsized_samples.py
"""

import torch
from torch import nn

from hf_fngd import FNGD, clip_samples

ROWS, TEST_ROWS, FEATURES, EPOCHS, BATCH_SIZE, LR = 4096, 1024, 8, 8, 64, 1e-2


def make_rows(count):
    """Features [count, 8] and prices [count, 1] with mean 0 and standard deviation 1, but for a little noise."""
    x = torch.randn(count, FEATURES)
    price = torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.5 * x[:, 3:].sum(dim=1)
    return x, (price / 1.6 + 0.1 * torch.randn(count))[:, None]


def train(make_optimizer, clipped, data, test):
    """Train a new network; returns its root mean squared error on the test rows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(),
        nn.Linear(128, 1),
    )  # fmt: skip
    optimizer = make_optimizer(model)
    if clipped:
        # Each sample's gradient is clipped at the output, whatever the optimizer. FNGD clips them layer by layer, which
        # also tells outsized inputs. In a model of transformers the module to hook is its head: model.lm_head,
        # model.classifier.
        model[-1].register_forward_hook(lambda module, args, output: clip_samples(output))
    steps = EPOCHS * (len(data[0]) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data[0])).split(BATCH_SIZE):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(data[0][batch]), data[1][batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as Trainer does
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return nn.functional.mse_loss(model(test[0]), test[1]).sqrt().item()


torch.manual_seed(0)
x, price = make_rows(ROWS)
in_cents = torch.rand(ROWS) < 0.01
test = make_rows(TEST_ROWS)

print(f"{in_cents.sum()} of {ROWS} rows have their price in cents; the error of a constant is {test[1].std():.2f}\n")
OPTIMIZERS = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=LR),
    "FNGD": lambda model: FNGD(model, lr=LR),
}
print("optimizer  clip_samples  all in one unit  some in cents")
for name, make_optimizer in OPTIMIZERS.items():
    for clipped in (False, True):
        errors = [
            train(make_optimizer, clipped, (x, torch.where(mixed[:, None], 100 * price, price)), test)
            for mixed in (torch.zeros_like(in_cents), in_cents)
        ]
        print(f"{name:9}  {clipped!s:12}  {errors[0]:15.3f}  {errors[1]:13.3f}")
