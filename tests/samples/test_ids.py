"""Samples of several rows, and rows of several samples: groups and packed sequences, against the oracle and padding."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.data.data_collator import DataCollatorWithFlattening

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.engine.layer import NOT_ITS_ROWS
from hf_fngd.layers.base import AMBIGUOUS
from hf_fngd.samples.rows import Labeled, View
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


# Trainer, packed against padded ----------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 64}
    plain = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop", "bos_token_id", "eos_token_id"], 0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **plain, use_cache=False, attn_implementation="sdpa"))


def batches(own: list[Tensor]) -> tuple[Batch, Batch]:
    """The same texts, packed and padded."""
    one, of = packed(own, 4)
    one["labels"] = one["input_ids"].masked_fill((one["position_ids"] == 0) | (of < 0), -100)
    ids = pad_sequence(own, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in own], batch_first=True)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    labels = ids.masked_fill((mask == 0) | (places == 0), -100)
    return one, {"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": labels}


@pytest.mark.parametrize("precision", ["float64", "float32", "bf16"])
@pytest.mark.parametrize("sharing", ["clipped", "uniform", "never"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_packed_batch_is_weighed_as_the_same_samples_padded(
    build: Callable[[], nn.Module], sharing: str, precision: str
) -> None:
    """64 texts in 4 rows, which are padded too but for "never", and in 64."""
    own = texts(tuple(3 + n % 16 % 7 + (n < 16 and sharing != "never") for n in range(64)))
    gradients = []
    for batch in batches(own):
        model = build().to(torch.float32 if precision == "bf16" else getattr(torch, precision))
        preconditioner = FNGDPreconditioner(model, strict=sharing != "never", **settings_of(sharing))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        preconditioner.step()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    tolerance = {"float64": 1e-12, "float32": 1e-6, "bf16": 2e-2}[precision]
    for name, g in gradients[1].items():
        error = (gradients[0][name] - g).norm() / g.norm()
        assert error < tolerance, (name, error)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # as older versions have it
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_accumulated_steps_on_packed_batches_are_those_on_padded_ones(
    build: Callable[[], nn.Module], checkpointing: str
) -> None:
    """Four steps of two micro-batches each, the default's whole update included."""
    own = texts(tuple(3 + n % 6 for n in range(16)))
    trained = []
    for kind in (0, 1):
        model = build().double().train()
        if checkpointing != "none" and kind == 0:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
        optimizer = FNGD(model, lr=1e-2)
        for _ in range(4):
            for half in (own[:8], own[8:]):
                (model(**batches(half)[kind]).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(dict(model.named_parameters()))
    for name, p in trained[1].items():
        torch.testing.assert_close(trained[0][name], p, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("layout", ["positions", "positions that do not restart", "lengths", "sample_ids"])
@pytest.mark.usefixtures("fresh_compiler")
# Raised and ignored by the compiler itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_graphs_tell_tokens_apart(layout: str) -> None:
    """With other lengths in each step, without another compilation."""
    counter = CompileCounterWithBackend("aot_eager")
    eager, model = build("rows"), build("rows")
    preconditioners = [
        FNGDPreconditioner(one, strict=True, layer_types=["linear", "embedding"]) for one in (eager, model)
    ]
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for lengths in (LENGTHS, (3, 2, 5, 4, 4, 3), (2, 7, 4, 4, 6, 3, 3, 2)):
        own = texts(lengths)
        batch, of = packed(own, 1 if layout == "lengths" else 2)
        if layout == "lengths":
            del batch["position_ids"]
            batch["cu_seq_lens_q"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        elif layout != "positions":
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
        if layout == "sample_ids":
            batch["sample_ids"] = of
        for one, called, preconditioner in zip((eager, model), (eager, compiled), preconditioners, strict=True):
            one.zero_grad()
            of_samples(called(**batch), of, own).backward()
            preconditioner.step()
        for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
    assert counter.frame_count <= 2


def test_trainer_takes_the_column_and_flattened_batches(tmp_path: Any) -> None:
    """Of transformers' collator without padding; and pairs by a column that the forward of the model does not name."""
    rows = [
        {"input_ids": text.tolist(), "labels": text.tolist(), "sample_ids": n // 2} for n, text in enumerate(texts())
    ]
    sizes = []
    for collator, expected in ((DataCollatorWithFlattening(return_flash_attn_kwargs=True), 8), (pad, 4)):
        model = llama()
        optimizer = FNGD(model, strict=True)
        begin = optimizer.preconditioner.policy.begin
        optimizer.preconditioner.policy.begin = lambda size, offset, begin=begin: (
            sizes.append(size) or begin(size, offset)
        )
        args = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
        )
        Trainer(model, args, train_dataset=rows, data_collator=collator, optimizers=(optimizer, None)).train()
        assert sizes == [expected]
        sizes.clear()


def pad(rows: list[dict[str, Any]]) -> Batch:
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": ids, "sample_ids": torch.tensor([row["sample_ids"] for row in rows])}


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
