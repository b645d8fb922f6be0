"""Settings as a file: save them, look at them, load them elsewhere, share them on the Hub.

Run it with

    python examples/06_share_a_config.py
"""

from pathlib import Path

import torch
from torch import nn

from hf_fngd import FNGD, FNGDConfig

# Start from a preset and say what differs. A wrong name or value is refused here, not in the middle of a run.
config = FNGDConfig.preset("default", lr=1e-2, weight_decay=0.01, exclude_modules=["classifier"])

# Only fngd_config.json is written, so a config can lie beside a model in the same folder.
folder = Path("outputs/example_06")
path = config.save_pretrained(folder)
print(f"{path}:\n{path.read_text()}")

# To share it (this needs a network and a login, `hf auth login`):
#
#     config.push_to_hub("user/repo")
#     config = FNGDConfig.from_pretrained("user/repo")
#
# A local folder works in the same way, and arguments may be replaced on loading.
loaded = FNGDConfig.from_pretrained(folder)
print(f"loaded settings equal the saved ones: {loaded == config}")
slower = FNGDConfig.from_pretrained(folder, lr=5e-3)
print(f"learning rate replaced on loading: {slower.lr}")

# A config knows no model: it is applied to one. "classifier" was excluded above, and the report says so.
torch.manual_seed(0)
model = nn.Sequential()
model.add_module("encoder", nn.Linear(8, 16))
model.add_module("activation", nn.ReLU())
model.add_module("classifier", nn.Linear(16, 2))
optimizer = FNGD.from_config(model, loaded)

inputs = torch.randn(64, 8)
labels = (inputs.sum(dim=1) > 0).long()
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"\n{optimizer.coverage()}")
print(f"\nloss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
