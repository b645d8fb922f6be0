"""Packed batches of language models against the same samples padded: gradients, steps, compiled graphs, Trainer."""

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
from tests.nets import settings_of
from tests.samples.packing import (
    LENGTHS,
    VOCABULARY,
    Batch,
    build,
    of_samples,
    packed,
    texts,
)


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
