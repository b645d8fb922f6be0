"""What the suite has to know of a family, the registry, and the batches that the families share."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_fngd.engine.reasons import CALLED_AGAIN, NEVER_CALLED, USED_ELSEWHERE
from hf_fngd.layers.base import AMBIGUOUS
from hf_fngd.layers.select import COUPLES
from hf_fngd.samples.rows import NOT_THE_BATCH

Batch = dict[str, Any]
Oracle = Literal["alone", "captured"]

VOCABULARY, WIDTH, HEADS, INNER, CLASSES, PAD = 40, 16, 2, 24, 3, 1
POSITIONS = 7

# Outcomes of a parameter: preconditioned, plain for the reasons of `hf_fngd.layers.select`, or missed.
PRECONDITIONED = "preconditioned"
WEIGHED = "weighed"  # outside of the preconditioned layers
TIED = "the weight is tied to another module"
MISSED = (NOT_THE_BATCH, AMBIGUOUS, CALLED_AGAIN, USED_ELSEWHERE, NEVER_CALLED)


def kind(layer_type: str) -> str:
    """The reason why the parameters of a module that is no Linear, Conv1D or convolution are plain."""
    return f"{layer_type} is not a preconditioned layer type" + f": {COUPLES}" * layer_type.startswith("BatchNorm")


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny model, its batches, and what is expected of every trainable parameter.

    Attributes:
        name: of the family.
        build: makes the model, without dropout.
        batch: ``(samples, positions)`` to the keyword arguments of the model, labels included.
        outcomes: outcome (`PRECONDITIONED` or a reason) to patterns, separated by spaces. In a pattern ``*`` stands
            for one part of a dotted name or a piece of it, ``**`` for several, ``(a|b)`` for either; a final
            ``.weight`` or ``.bias`` may be left out. What no pattern matches is plain by the type of its module.
        oracle: "alone": each sample runs through the model by itself. "captured": the samples interact, and their
            shares of the gradient come from the inputs and output gradients of the layers of the plain model.
        square: a number of samples that is also the number of positions of some layer (of the text, where the model
            reads one).
        remark: for the table.
        behind: the layer behind the BatchNorms, which clips for those before them.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]
    outcomes: Mapping[str, str]
    oracle: Oracle
    square: int
    remark: str
    behind: str | None = None

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in training mode, with parameters far enough from their initial ones for all to matter."""
        torch.manual_seed(0)
        model = self.build().train()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the default has no float64
        return model.to(dtype)

    def expected(self, name: str) -> str:
        """The outcome that is expected of a trainable parameter.

        Raises:
            LookupError: several outcomes have patterns that match the name.
        """
        found = [
            outcome
            for outcome, patterns in self.outcomes.items()
            if any(matches(pattern, name) for pattern in patterns.split())
        ]
        if len(found) > 1:
            raise LookupError(f"{self.name}: {name} is expected to be {found}")
        return found[0] if found else kind(owners(self)[name])

    def patterns(self) -> list[str]:
        return " ".join(self.outcomes.values()).split()


@functools.cache
def owners(family: Family) -> dict[str, str]:
    """The type of the module that has a parameter, by the parameter's name."""
    return {
        f"{name}.{leaf}" if name else leaf: type(module).__name__
        for name, module in family.build().named_modules(remove_duplicate=False)
        for leaf, _ in module.named_parameters(recurse=False)
    }


def matches(pattern: str, name: str) -> bool:
    expression = pattern.replace(".", r"\.").replace("*", r"[^.]+").replace("[^.]+[^.]+", ".+")
    return re.fullmatch(rf"{expression}(\.weight|\.bias)?", name) is not None


FAMILIES: dict[str, Family] = {}


def family(
    name: str,
    build: Callable[[], nn.Module],
    preconditioned: str,
    others: Mapping[str, str] | None = None,
    *,
    batch: Callable[[int, int], Batch] | None = None,
    tied: str = "",
    oracle: Oracle = "alone",
    square: int = 8,
    remark: str = "",
    behind: str | None = None,
) -> None:
    """Register a family: the patterns of what is preconditioned, of those that share a weight, and other outcomes.

    Its batches are those of language models where it has none of its own.
    """
    assert name not in FAMILIES
    outcomes = {PRECONDITIONED: preconditioned, TIED: tied} | (others or {})
    FAMILIES[name] = Family(name, build, batch or language, outcomes, oracle, square, remark, behind)


# Sizes of all models that have a size of this name.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "hidden_dim"), INNER
    ),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("n_heads", "n_head", "num_heads"), HEADS),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 32),
    **{"vocab_size": VOCABULARY, "type_vocab_size": 2, "d_inner": INNER},
    **{"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": PAD},
}


def sized(cls: Any, *without: str, **changes: Any) -> Callable[[], nn.Module]:
    """A builder of a model of transformers: tiny, without dropout, and with some changes or sizes left as they are."""

    def build() -> nn.Module:
        known = cls.config_class().to_dict()
        sizes = {key: value for key, value in SIZES.items() if key in known and key not in without}
        dropout = {key: 0.0 for key, value in known.items() if "drop" in key and isinstance(value, float)}
        made: nn.Module = cls(cls.config_class(**(sizes | dropout | changes)))
        return made

    return build


# Batches: the same number of labels for every sample, so that the batch loss is the mean of the samples' losses ----


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(value * 100**place for place, value in enumerate(key)))


def tokens(n: int, t: int) -> Batch:
    """Texts without padding."""
    return {"input_ids": torch.randint(3, VOCABULARY, (n, t), generator=_generator(n, t, 1))}


def padded(n: int, t: int) -> Batch:
    """Texts, of which some end in one or two positions of padding."""
    batch = tokens(n, t)
    lengths = t - torch.arange(n) % 3
    mask = (torch.arange(t) < lengths[:, None]).long()
    batch["input_ids"] = torch.where(mask == 1, batch["input_ids"], PAD)
    return batch | {"attention_mask": mask}


def token_labels(n: int, t: int, classes: int = VOCABULARY) -> Tensor:
    """Three labels a text, neither at its first position, which causal models drop, nor where padding may be."""
    generator = _generator(n, t, 2)
    labels = torch.full((n, t), -100)
    for row in labels:
        places = 1 + torch.randperm(t - 3, generator=generator)[:3]
        row[places] = torch.randint(min(3, classes - 1), classes, (3,), generator=generator)
    return labels


def labels(n: int) -> Tensor:
    return torch.randint(CLASSES, (n,), generator=_generator(n, 3))


def language(n: int, t: int) -> Batch:
    """For masked, causal and sequence-to-sequence language models."""
    return padded(n, t) | {"labels": token_labels(n, t)}


def classification(n: int, t: int) -> Batch:
    return padded(n, t) | {"labels": labels(n)}


def token_classification(n: int, t: int) -> Batch:
    return padded(n, t) | {"labels": token_labels(n, t, CLASSES)}


def images(height: int, width: int) -> Callable[[int, int], Batch]:
    """Classified images; their number of positions does not vary."""

    def batch(n: int, t: int) -> Batch:
        return {"pixel_values": signal(n, 3, height, width), "labels": labels(n)}

    return batch


def to(dtype: torch.dtype, batch: Batch) -> Batch:
    """The batch with its real numbers in a precision."""
    real = {key for key, value in batch.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {key: value.to(dtype) if key in real else value for key, value in batch.items()}


def signal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(shape[0], 4), dtype=torch.float64)
