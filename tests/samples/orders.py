"""A small model that has its samples in different places, its batches, and what the oracle expects of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import Clipping, Dense, per_sample_gradients, uses_of

WIDTH, CLASSES = 6, 3
DAMPING = 0.03


class Attention(nn.Module):
    """Two Linear layers with attention over the positions between them, ``[N, T, d]`` whatever the input's order."""

    def __init__(self, order: str = "batch first") -> None:
        super().__init__()
        self.order = order
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.fc1, self.fc2, self.fc3 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "time first":
            y = self.fc1(self.norm(x))
            scores = torch.einsum("tnd,snd->nts", y, y).softmax(-1)
            y = self.rms(self.fc2(torch.einsum("nts,snd->tnd", scores, y))).tanh()
            return self.fc3(y).mean(0)
        n, t = x.shape[:2]
        y = self.fc1(self.norm(x))
        y = torch.einsum("nts,nsd->ntd", torch.einsum("ntd,nsd->nts", y, y).softmax(-1), y)
        if self.order == "folded, samples first":
            return self.fc3(self.rms(self.fc2(y.flatten(0, 1))).tanh()).view(n, t, -1).mean(1)
        if self.order == "folded, positions first":
            return self.fc3(self.rms(self.fc2(y.transpose(0, 1).flatten(0, 1))).tanh()).view(t, n, -1).mean(0)
        return self.fc3(self.rms(self.fc2(y)).tanh()).mean(1)


def build(order: str) -> Attention:
    torch.manual_seed(0)
    return Attention(order).double()


def batch(n: int, t: int, order: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + 100 * t)
    x = torch.randn(n, t, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return (x.transpose(0, 1).contiguous() if order == "time first" else x), y


def expected(model: nn.Module, x: Tensor, y: Tensor, sharing: str, dim: int, modules: list[str]) -> dict[str, Tensor]:
    """The weighted gradients of these modules, by the oracle."""

    def alone(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(x.narrow(dim, n, 1)), y[n : n + 1])

    found: dict[str, Tensor] = {}
    if sharing == "clipped":
        trained = {name for name, _ in model.named_parameters()}

        def share(model: nn.Module, n: int) -> Tensor:
            return alone(model, n) / len(y)

        found, _ = Clipping().gradients([uses_of(model, modules, share, n, trained) for n in range(len(y))])
    else:
        for name in modules:
            own = dict(model.get_submodule(name).named_parameters(name))
            p = Dense(per_sample_gradients(model, list(own.values()), alone, len(y)), DAMPING).p
            found.update(zip(own, p.split([q.numel() for q in own.values()]), strict=True))
    return {name: g.view_as(model.get_parameter(name)) for name, g in found.items()}
