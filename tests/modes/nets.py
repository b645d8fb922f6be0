"""The two kinds of models that every mode is tried on, their data, and their losses by hand."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from datasets import Dataset
from torch import Tensor, nn

VOCABULARY, LENGTH, PADDING = 24, 8, 1
POSITIONS = 16  # of the models
# Wide enough for gradients above Trainer's clipping threshold, and weights far from 1.
INITIAL = 0.3

Inputs = Mapping[str, Tensor]
SampleLoss = Callable[[nn.Module, Inputs, float], Tensor]


SIZES = {
    **{"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "initializer_range": INITIAL},
    **{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
}
TOKENS = {"bos_token_id": 0, "eos_token_id": PADDING, "pad_token_id": PADDING}


def bert(**changes: Any) -> hf.BertForSequenceClassification:
    torch.manual_seed(0)
    # The type of the problem is else found out, and written, in the first forward pass.
    config = {"intermediate_size": 12, "num_labels": 3, "problem_type": "single_label_classification"}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(**(SIZES | config | changes)))


def gpt2(**changes: Any) -> hf.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = {"n_inner": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**(SIZES | TOKENS | config | changes)))
    model.loss_type = "ForCausalLM"  # else it warns in the first forward pass, which is no graph of its own
    return model


def llama() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"intermediate_size": 12, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | TOKENS | config)))


@contextlib.contextmanager
def older_names() -> Iterator[None]:
    """PEFT reads a property that transformers renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def classification_loss(model: nn.Module, samples: Inputs, smoothing: float) -> Tensor:
    """The sum of the samples' cross entropies."""
    kept = {key: value for key, value in samples.items() if key != "labels"}
    return F.cross_entropy(model(**kept).logits, samples["labels"], label_smoothing=smoothing, reduction="sum")


def language_loss(model: nn.Module, samples: Inputs, smoothing: float) -> Tensor:
    """The sum of the tokens' cross entropies: batches are normalized by tokens, not by sequences."""
    kept = {key: value for key, value in samples.items() if key != "labels"}
    logits, labels = model(**kept).logits[:, :-1], samples["labels"][:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=smoothing, reduction="sum"
    )


def classification_data(samples: int) -> Dataset:
    """Sequences of one length, whose first token gives the class."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (samples, LENGTH), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def language_data(samples: int) -> Dataset:
    """The same sequences; a sample's last tokens, zero to three of them, do not count."""
    ids = classification_data(samples)["input_ids"]
    labels = [[token if place < LENGTH - n % 4 else -100 for place, token in enumerate(ids[n])] for n in range(samples)]
    return Dataset.from_dict({"input_ids": list(ids), "labels": labels})


@dataclass(frozen=True)
class Kind:
    """A column of the table: a layer type in a model that has it.

    Attributes:
        name: of the layer type.
        make: the model, always the same.
        data: that many samples.
        loss: the sum over samples, up to the factor that is the same for all of a micro-batch.
    """

    name: str
    make: Callable[..., nn.Module]
    data: Callable[[int], Dataset]
    loss: SampleLoss


LINEAR = Kind("Linear", bert, classification_data, classification_loss)
CONV1D = Kind("Conv1D", gpt2, language_data, language_loss)
KINDS = (LINEAR, CONV1D)
