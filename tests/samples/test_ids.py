"""Samples of several rows, and rows of several samples: groups and packed sequences, against the oracle."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_fngd import FNGDPreconditioner
from hf_fngd.engine.reasons import NOT_ITS_ROWS
from hf_fngd.layers.base import AMBIGUOUS
from hf_fngd.samples.rows import Labeled, View
from tests.nets import settings_of
from tests.samples.packing import (
    DAMPING,
    LENGTHS,
    VOCABULARY,
    WIDTH,
    Attention,
    build,
    check,
    expected,
    of_samples,
    packed,
    texts,
)

# Tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["clipped", "never"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("layout", ["rows", "folded", "turned"])
def test_texts_of_a_packed_row_are_samples_where_positions_restart(layout: str, rows: int, sharing: str) -> None:
    # Without padding, of which "never" would make a sample in each row.
    own = texts(LENGTHS if sharing == "clipped" or rows == 1 else (4, 1, 3, 2, 2, 3, 1, 4))
    batch, of = packed(own, rows)
    check(build(layout), batch, of, sharing, own)


@pytest.mark.parametrize("sharing", ["clipped", "never"])
@pytest.mark.parametrize("said", ["sample_ids", "lengths", "lengths, one dimension", "sample_ids, one dimension"])
def test_ids_and_cumulated_lengths_tell_the_same(said: str, sharing: str) -> None:
    own = texts()
    batch, of = packed(own, 1)
    positions = batch.pop("position_ids")
    bounds = F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int()
    batch["cu_seq_lens_q"] = bounds
    if said.startswith("sample_ids"):
        batch = {"input_ids": batch["input_ids"], "position_ids": positions, "sample_ids": of.flip(0) * 7 - 3}
    if said.endswith("one dimension"):
        batch = {key: value[0] if value.dim() == 2 else value for key, value in batch.items()}
        if "position_ids" in batch:
            batch["position_ids"] = batch["position_ids"][None]
    check(build("rows"), batch, of, sharing, own)


@pytest.mark.parametrize("positions", ["none", "of the padding too"])
def test_positions_that_do_not_restart_tell_of_rows(positions: str) -> None:
    own = texts()
    ids = pad_sequence(own, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(text) for text in own], batch_first=True, padding_side="left")
    # As transformers' own for generation; zeros, as others have them, say the same behind a mask.
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, int(positions != "none"))
    with_places = {"input_ids": ids, "position_ids": places, "attention_mask": mask}
    gradients = []
    for batch in (with_places, {"input_ids": ids, "sample_ids": torch.arange(len(own))}):
        model = Masked().double()
        _kept = FNGDPreconditioner(model, **settings_of("clipped"))
        output = model(**batch)
        torch.stack(
            [F.cross_entropy(output[n], ids[n]) * (1 + 30 * (n == 2)) for n in range(len(own))]
        ).sum().backward()
        gradients.append(model.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


class Masked(Attention):
    """Takes positions and a mask, and does nothing with them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def forward(self, input_ids: Tensor, position_ids: Any = None, attention_mask: Any = None) -> Tensor:
        return super().forward(input_ids)


class Mixed(Attention):
    """A layer sees neither the rows nor the tokens, but one mean a row."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled = nn.Linear(VOCABULARY, VOCABULARY)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        return y + self.pooled(y.mean(1))[:, None]


def test_a_layer_that_sees_neither_rows_nor_tokens_is_plain_and_told() -> None:
    own = texts()
    batch, of = packed(own, 2)
    model = Mixed().double()
    plain = copy.deepcopy(model)
    preconditioner = FNGDPreconditioner(model)
    for one in (model, plain):
        of_samples(one(**batch), of, own).backward()
    preconditioner.step()
    assert preconditioner.coverage().missed == dict.fromkeys(["pooled.weight", "pooled.bias"], NOT_ITS_ROWS)
    torch.testing.assert_close(model.pooled.weight.grad, plain.pooled.weight.grad)


# Groups of rows --------------------------------------------------------------------------------------------


class Tail(nn.Module):
    """Rows ``[B, d]`` or ``[B, T, d]``, also folded with their positions."""

    def __init__(self, folds: bool) -> None:
        super().__init__()
        self.folds = folds
        self.fc1, self.rms, self.fc2 = nn.Linear(WIDTH, 5), nn.RMSNorm(5), nn.Linear(5, 1)
        self.norm, self.table = nn.LayerNorm(WIDTH), nn.Embedding(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) * self.table(x.new_zeros(x.shape[:2], dtype=torch.long))
        y = self.rms(self.fc1(y.flatten(0, 1) if self.folds else y)).tanh()
        return self.fc2(y).view(*x.shape[:2]).mean(1)


@pytest.mark.parametrize("sharing", ["clipped", "never"])
@pytest.mark.parametrize("folds", [False, True])
def test_rows_of_one_group_are_one_sample(folds: bool, sharing: str) -> None:
    """Pairs, as a preference loss has them: those chosen first, then those rejected."""
    torch.manual_seed(1)
    model = Tail(folds).double()
    plain = copy.deepcopy(model)
    x = torch.randn(10, 3, WIDTH, dtype=torch.float64)
    x[2] *= 20

    def loss(values: Tensor) -> Tensor:
        chosen, rejected = values.chunk(2)
        return F.softplus(rejected - chosen)

    def of_pair(model: nn.Module, n: int) -> Tensor:
        return loss(model(x[[n, n + 5]])).sum()

    preconditioner = FNGDPreconditioner(model, strict=True, **settings_of(sharing, damping=DAMPING))
    loss(model(x, sample_ids=torch.arange(5).repeat(2) * 3)).mean().backward()
    preconditioner.step()
    for name, g in expected(plain, of_pair, 5, sharing).items():
        torch.testing.assert_close(model.get_parameter(name).grad, g, rtol=1e-8, atol=1e-11, msg=name)


def test_where_no_probe_runs_as_many_positions_as_rows_are_ambiguous() -> None:
    class Closed(Tail):
        def forward(self, x: Tensor) -> Tensor:
            assert self.training
            return super().forward(x)

    model = Closed(False)
    preconditioner = FNGDPreconditioner(model)
    model(torch.randn(3, 3, WIDTH), sample_ids=torch.tensor([0, 0, 1])).sum().backward()
    preconditioner.step()
    assert set(preconditioner.coverage().missed.values()) == {AMBIGUOUS}


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (torch.ones(4), TypeError, "tensor of integers.*torch.float32"),
        ([0, 0, 1, 1], TypeError, "the batch has list"),
        (torch.arange(3), ValueError, r"shape \(3,\).*\(4, 3, 6\).*\[B\]"),
        (torch.zeros(4, 2, dtype=torch.long), ValueError, r"shape \(4, 2\)"),
    ],
)
def test_ids_that_are_none_are_refused(ids: Any, error: type[Exception], match: str) -> None:
    model = Tail(False)
    _kept = FNGDPreconditioner(model)
    with pytest.raises(error, match=match):
        model(torch.randn(4, 3, WIDTH), sample_ids=ids)


def test_the_column_is_kept_from_the_model_in_evaluation_too_and_goes_where_a_forward_names_it() -> None:
    seen = []

    class Named(Tail):
        def forward(self, x: Tensor, sample_ids: Tensor | None = None) -> Tensor:
            seen.append(sample_ids)
            return super().forward(x)

    x, ids = torch.randn(4, 3, WIDTH), torch.tensor([0, 0, 1, 1])
    for model in (Tail(False), Named(False)):
        _kept = FNGDPreconditioner(model)
        model(x, sample_ids=ids)
        model.eval()(x, sample_ids=ids)
    assert all(one is ids for one in seen[-2:])


# Rows ------------------------------------------------------------------------------------------------------


def test_labeled_rows_agree_with_views() -> None:
    torch.manual_seed(0)
    norms, x = torch.rand(12) * 1e15, torch.randn(12, 2, 3)
    w = torch.rand(4)
    for order in ("first", "last"):
        view = View(0, order)
        labeled = Labeled(0, view.of_rows(torch.arange(4), 12))
        torch.testing.assert_close(labeled.of_rows(w, 12), view.of_rows(w, 12))
        for adds in (True, False):
            torch.testing.assert_close(labeled.of_samples(norms, 4, adds), view.of_samples(norms, 4, adds))
        torch.testing.assert_close(labeled.samples_first(x, 4, 12), view.samples_first(x, 4, 12))
        torch.testing.assert_close(
            labeled.samples_first(x.flatten(0, 1), 4, 12), view.samples_first(x.flatten(0, 1), 4, 12)
        )
    assert Labeled(0, torch.arange(0)).of_samples(torch.zeros(0), 2, False).tolist() == [0, 0]
