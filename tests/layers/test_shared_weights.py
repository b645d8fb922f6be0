"""Linear layers that share a weight with each other, and with an embedding."""

import torch
from torch import Tensor, nn

from hf_fngd import FNGD, FNGDPreconditioner


class Twice(nn.Module):
    """Two Linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(self.own(x)))
        return y


def test_linear_layers_with_one_weight_are_clipped_by_their_inputs_too() -> None:
    model, kept = Twice().double(), dict[nn.Module, list[Tensor]]()
    preconditioner = FNGDPreconditioner(model)

    def keep(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        kept[module] = [args[0].detach()]
        y.register_hook(lambda g: kept[module].append(g))

    for module in (model.one, model.two):
        module.register_forward_hook(keep)
    x = torch.randn(5, 4, dtype=torch.float64)
    x[0] *= 1000  # whose output gradients are as large as all others
    model(x).sum().backward()
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    for a, g in kept.values():
        norms = a.norm(dim=1) * g.norm(dim=1)
        wanted += (g * (norms.mean() / norms).clamp(max=1)[:, None]).mT @ a
    assert model.one.weight.grad is not None
    assert preconditioner.coverage().weighed == ("one.weight", "two.weight")
    torch.testing.assert_close(model.one.weight.grad, wanted, rtol=1e-9, atol=0)


def test_the_fallback_rule_moves_a_shared_weight_as_the_report_says() -> None:
    model = Twice()
    optimizer = FNGD(model)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    group = next(group for group in optimizer.param_groups if "one.weight" in group["param_names"])
    assert group["rule"] == "adam"
    assert "one.weight" in optimizer.coverage().weighed
