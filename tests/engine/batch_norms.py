"""A network with BatchNorms, and whose gradients in it are those of a plain model."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_fngd import FNGDPreconditioner

PLAIN = {"0.weight", "7.weight", "7.bias"}


def network(cls: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """Two convolutions and two linear layers; a BatchNorm reads the first of each."""
    torch.manual_seed(0)
    return cls(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(8 * 16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
    ).double()


def images(seed: int = 0) -> Tensor:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0] *= 10
    return x


def clipping(layer: nn.Linear) -> None:
    """Clip the samples at a linear layer's output, for itself and for everything before it."""
    size = 0.0 if layer.bias is None else 1.0

    def forward_hook(_: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        of_x = torch.hypot(args[0].detach().norm(dim=1), torch.tensor(size, dtype=y.dtype))

        def clipped(g: Tensor) -> Tensor:
            norms = of_x * g.norm(dim=1)
            assert norms.max() > 1.5 * norms.mean()
            return g * (norms.mean() / norms).clamp(max=1)[:, None]

        y.register_hook(clipped)

    layer.register_forward_hook(forward_hook)


def loss(y: Tensor) -> Tensor:
    """The first sample counts 20 times."""
    of_samples = y.square().sum(dim=1)
    return of_samples.sum() + 19 * of_samples[0]


def steps(
    model: nn.Module, called: nn.Module, preconditioner: FNGDPreconditioner, behind: Sequence[str] = ()
) -> set[str]:
    """Three of them; returns the names whose gradients were those of a plain model in each.

    The plain model clips at the layers ``behind``.
    """
    plain, names = copy.deepcopy(model), {name for name, _ in model.named_parameters()}
    for name in behind:
        clipping(plain.get_submodule(name))
    for seed in range(3):
        for one, own in ((model, called), (plain, plain)):
            one.zero_grad()
            loss(own(images(seed))).backward()
        preconditioner.step()
        for name, p in plain.named_parameters():
            if p.requires_grad and not torch.allclose(model.get_parameter(name).grad, p.grad, rtol=1e-9):
                names.discard(name)
    return names
