"""A small model with attention within texts, batches of packed texts, and what the oracle expects of them."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_fngd import FNGDPreconditioner
from tests.nets import settings_of
from tests.reference import Clipping, Dense, per_sample_gradients, uses_of

VOCABULARY, WIDTH = 11, 6
DAMPING = 0.03
LENGTHS = (4, 1, 6, 3, 5, 2, 7, 4)
CALLED = ["table", "norm", "fc1", "rms", "fc2"]
Batch = dict[str, Tensor]


class Attention(nn.Module):
    """Attention to a text's tokens so far, in all of a batch's texts, which positions or cumulated lengths tell apart.

    The layers see the batch as ``layout`` says: "rows" ``[B, T, d]``, "folded" ``[B T, d]``, "turned" ``[T, B, d]``.
    """

    def __init__(self, layout: str = "rows") -> None:
        super().__init__()
        self.layout = layout
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(5)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, VOCABULARY, bias=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None
    ) -> Tensor:
        n, t = input_ids.shape if input_ids.dim() == 2 else (1, len(input_ids))
        if cu_seq_lens_q is not None:
            text = torch.bucketize(torch.arange(t), cu_seq_lens_q[1:], right=True)[None]
        else:
            text = input_ids.new_zeros(1, t) if position_ids is None else (position_ids == 0).cumsum(1)
        seen = (text[:, :, None] == text[:, None]).tril()
        ids = input_ids.t() if self.layout == "turned" else input_ids
        y = self.fc1(self.norm(self.table(ids.flatten() if self.layout == "folded" else ids)))
        shape = y.shape
        y = y.transpose(0, 1) if self.layout == "turned" else y.reshape(n, t, -1)
        y = (y @ y.transpose(1, 2)).masked_fill(~seen, -torch.inf).softmax(-1) @ y
        y = (y.transpose(0, 1) if self.layout == "turned" else y).reshape(shape)
        y = self.fc2(self.rms(y).tanh())
        return y.transpose(0, 1) if self.layout == "turned" else y.reshape(n, t, -1)


def build(layout: str) -> Attention:
    torch.manual_seed(0)
    return Attention(layout).double()


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """None has a token twice: where all are one, attention has no gradient but for rounding."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randperm(VOCABULARY, generator=generator)[:length] for length in lengths]


def packed(own: list[Tensor], rows: int) -> tuple[Batch, Tensor]:
    """Texts behind each other in some rows of one length, padding behind them; and which text each token is of."""
    share = len(own) // rows
    parts = [list(range(row * share, (row + 1) * share)) for row in range(rows)]
    ids, positions, of = [], [], []
    for row in parts:
        ids.append(torch.cat([own[n] for n in row]))
        positions.append(torch.cat([torch.arange(len(own[n])) for n in row]))
        of.append(torch.cat([torch.full((len(own[n]),), 10 * n) for n in row]))
    pad = lambda x, value: pad_sequence(x, batch_first=True, padding_value=value)  # noqa: E731
    return {"input_ids": pad(ids, 0), "position_ids": pad(positions, 0)}, pad(of, -1)


def of_samples(output: Tensor, of: Tensor, own: list[Tensor]) -> Tensor:
    """The mean over the texts of a loss that is a text's own, larger for the third one."""
    losses = [F.cross_entropy(output[of == 10 * n], text, reduction="sum") for n, text in enumerate(own)]
    return (torch.stack(losses) * torch.tensor([1.0, 1, 30, 1, 1, 1, 1, 1])[: len(own)]).mean()


def alone(own: list[Tensor]) -> Callable[[nn.Module, int], Tensor]:
    def loss(model: nn.Module, n: int) -> Tensor:
        return F.cross_entropy(model(own[n][None])[0], own[n], reduction="sum") * (30 if n == 2 else 1)

    return loss


def expected(model: nn.Module, loss: Callable[[nn.Module, int], Tensor], samples: int, sharing: str) -> Batch:
    """The weighted gradients of a batch, by the oracle."""
    names = {name for name, _ in model.named_parameters()}
    if sharing == "clipped":
        found, _ = Clipping().gradients([uses_of(model, CALLED, loss, n, names) for n in range(samples)], 1 / samples)
        return {name: g.view_as(model.get_parameter(name)) for name, g in found.items()}
    found = {}
    for name in ("fc1", "fc2"):
        own = dict(model.get_submodule(name).named_parameters(name))
        p = Dense(per_sample_gradients(model, list(own.values()), loss, samples), DAMPING).p
        found.update(zip(own, p.split([q.numel() for q in own.values()]), strict=True))
    return {name: g.view_as(model.get_parameter(name)) for name, g in found.items()}


def check(model: nn.Module, batch: Batch, of: Tensor, sharing: str, own: list[Tensor]) -> None:
    """One backward pass against the oracle."""
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model, strict=True, **settings_of(sharing, damping=DAMPING))
    of_samples(model(**batch), of, own).backward()
    preconditioner.step()
    for name, g in expected(plain, alone(own), len(own), sharing).items():
        torch.testing.assert_close(model.get_parameter(name).grad, g, rtol=1e-8, atol=1e-11, msg=name)
    assert not preconditioner.coverage().missed
