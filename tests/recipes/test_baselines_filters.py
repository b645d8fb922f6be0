"""What the baselines make of the filters of convolutions."""

import pytest
import torch
from torch import nn

from baselines import BASELINES, BaselineFactory
from baselines.factory import baseline_layers
from baselines.kfac import KFAC, EigenKFAC
from baselines.kronecker import patches


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"padding": (2, 0), "dilation": 2, "bias": False}]
)
def test_a_filter_is_a_matrix_that_multiplies_patches(options):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, (3, 2), **options), torch.randn(2, 3, 7, 6)
    product = patches(layer, x) @ layer.weight.flatten(1).mT
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(product + bias, layer(x).flatten(2).mT)


class Pointwise(nn.Module):
    """Two layers, at each position of an image: convolutions of one entry, or Linears."""

    def __init__(self, convolution):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 4)
        if convolution:
            for name in ("one", "two"):
                linear = getattr(self, name)
                filters = nn.Conv2d(linear.in_features, linear.out_features, 1)
                filters.weight.data = linear.weight.data[:, :, None, None].clone()
                filters.bias.data = linear.bias.data.clone()
                setattr(self, name, filters)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_filters_of_one_entry_are_stepped_like_linears(name):
    if name == "soap":
        pytest.skip("the library's SOAP has an eigenbasis for each of a filter's dimensions")
    ends = []
    for convolution in (True, False):
        model = Pointwise(convolution)
        if name == "muon":  # which leaves the first convolution to AdamW
            model.one.requires_grad_(False)
        layers = [*baseline_layers(model).values()]
        weights = [layer.weight for layer in layers]
        optimizer = BASELINES[name].build([{"params": weights}], layers, lr=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            x = torch.randn(
                40, 3, 1, 1, generator=generator
            )  # KFAC counts an image, and not its positions, as a sample
            out = model(x) if convolution else model(x.movedim(1, -1)).movedim(-1, 1)
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
        ends.append([weight.detach().flatten(1) for weight in weights])
        assert not torch.equal(weights[-1].flatten(1), Pointwise(False).two.weight)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [KFAC, EigenKFAC])
def test_curvature_of_a_filter_has_the_trace_of_the_samples_gradients(cls):
    """Where positions have independent gradients `tr A tr G` is the mean squared norm of the images' gradients."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 1, bias=False)
    optimizer = cls([{"params": [layer.weight]}], [layer], lr=0.1, statistics_every=1, inverse_every=1)
    x, signs = torch.randn(2000, 3, 4, 4), torch.randn(2000, 4, 4, 4)
    (layer(x) * signs).sum((1, 2, 3)).mean().backward()
    per_sample = torch.einsum("noyx,niyx->noi", signs, x)
    optimizer.step()
    state = optimizer.state[layer.weight]
    found = state["A"].trace() * state["G"].trace()
    assert float(found / per_sample.square().sum((1, 2)).mean()) == pytest.approx(1, rel=0.1)


def test_muon_alone_leaves_the_first_convolution_to_adamw(name):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 2)
    )
    optimizer = BaselineFactory()(model, name=name, lr=0.1)
    matrices = {id(p) for group in optimizer.optimizers[0].param_groups for p in group["params"]}
    assert [id(model[n].weight) in matrices for n in (0, 1, 2)] == [name != "muon", False, True]


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_padding_that_the_patches_have_not_is_rejected_at_construction(options):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, **options))
    for name in ("kfac", "eva"):
        with pytest.raises(ValueError, match="padding is a number of zeros"):
            BaselineFactory()(model, name=name, lr=0.1)
