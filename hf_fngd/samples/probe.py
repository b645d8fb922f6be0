"""The probe: a forward pass with one sample fewer shows which rows of a layer's input belong to which sample.

Sizes alone do not show it: a batch can be as large as a sequence is long, or be folded into another dimension. So the
model runs twice on the first training batch, in eval mode and without gradients: on the whole batch, and on the batch
without its first sample. Exactly one dimension of a layer's input must shrink in proportion; it holds the samples. The
rows that stay must keep their values, in one of the orders that a `View` knows. A batch of one sample is compared with
two copies of it.

In the second pass the samples come in reverse order. Rows that a layer picks among all samples' (an expert's tokens)
may by chance stay in place when a sample is missing, but they are reversed only if every sample has an equal share.

Dimension 1 is tried too where dimension 0 does not act like samples: its entries change each other's values (as
positions do in attention), or are mixed in an input that does not grow with them (as positions are in the last state of
a recurrent layer). The dimension that explains more calls is taken. Nothing of a pass remains
(`hf_fngd.samples.snapshot`).
"""

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_fngd.samples.rows import NOT_THE_BATCH, View
from hf_fngd.samples.snapshot import copied, untouched

NOT_VERIFIED = (
    "leaving out a sample of the first batch changed what the layer saw of the others, so its rows cannot be told apart"
)
EQUAL_ROWS = "samples and positions are folded, in an order that the first batches did not tell, as all rows were equal"
UNSURE = (
    "no dimension of the batch holds samples that leave each other alone, as where the forward pass draws random "
    "numbers; batch_dim=0 or 1 says which one it is"
)

Digest = tuple[tuple[int, ...], Tensor]
Calls = dict[int, list[Digest]]  # by the layer's place, in the order of its calls
Verdict = View | str | None  # a view, or the reason why there is none; None: the batch shares it


class Found(NamedTuple):
    """What a probe found.

    Attributes:
        dim: the batch's dimension in the model's inputs.
        verdicts: one for each layer that was called, by its place.
        shares: of layers whose samples have several rows, how many a sample had in each call.
    """

    dim: int
    verdicts: dict[int, Verdict]
    shares: dict[int, frozenset[int]]


class CannotProbeError(Exception):
    """The inputs have a structure that the probe does not know, or are not finite."""


def probe(
    model: nn.Module,
    run: Callable[[Any, Any], Calls],
    inputs: tuple[Any, Any],
    sample: Tensor,
    batch_dim: int | None,
    known: int | None = None,
) -> Found:
    """Find the samples in the inputs of a model's layers.

    Args:
        model: the model.
        run: runs it on positional and named arguments, and returns what its layers saw.
        inputs: the positional and named arguments of the current forward pass.
        sample: the input that counts the samples.
        batch_dim: the dimension in which it does, if the user said so.
        known: the dimension that an earlier probe found.

    Raises:
        CannotProbeError: see there. Any error of the model on a batch of another size comes through as well.
    """
    if torch._C._get_tracing_state() is not None:
        raise CannotProbeError("torch.jit.trace is under way")
    only = known if batch_dim is None else batch_dim
    dims = [only] if only is not None else [0, 1][: 1 if len(sample) == 1 else sample.dim()]
    best, most = Found(dims[0], {}, {}), -1
    failure: Exception | None = None
    with untouched(model):
        for dim in dims:
            try:
                found, passed, grown, mixed = _try(run, inputs, sample.shape[dim], dim, trusted=batch_dim is not None)
            except Exception as error:  # whatever a model does with inputs of other sizes
                failure = error if dim == dims[0] else failure
                continue
            enough = passed == grown if dim or sample.dim() < 2 else 2 * passed > grown
            if len(sample) == 1:  # all rows are that sample's, whatever the copies showed
                for place in [place for place, one in found.verdicts.items() if isinstance(one, str)]:
                    del found.verdicts[place]
            elif not (enough or only is not None):
                found.verdicts.update({place: UNSURE for place, one in found.verdicts.items() if one is not None})
                passed = 0
            if passed > most:
                best, most = found, passed
            if passed == grown and not mixed:
                break
    if failure is not None and not most > 0:
        raise failure
    return best


def _try(
    run: Callable[[Any, Any], Calls], inputs: tuple[Any, Any], samples: int, dim: int, trusted: bool
) -> tuple[Found, int, int, int]:
    """Probe one dimension.

    Returns what it found; how many calls kept their values; how many grow with the dimension; and how many are mixed,
    that is change their values without growing.
    """
    own: tuple[Any, Any] = copied(inputs)  # the current forward pass has yet to run on the originals
    reverse = samples > 1
    if reverse:
        seen = run(*own)
        try:
            seen_fewer = run(*resized(copied(inputs), samples, dim, reverse=True))
        except Exception:  # packed sequences, say, have to be sorted by length
            reverse = False
            seen_fewer = run(*resized(copied(inputs), samples, dim))
    else:
        seen, seen_fewer = run(*resized(copied(inputs), samples, dim)), run(*own)
    samples = max(samples, 2)
    found: dict[int, Verdict] = {}
    shares: dict[int, frozenset[int]] = {}
    passed = grown = mixed = 0
    for place, calls in seen.items():
        others = seen_fewer.get(place, [])
        if len(others) != len(calls):
            found[place] = NOT_THE_BATCH
            mixed += len(calls)
            continue
        settled = dim if trusted else None
        verdicts = [_compare(a, b, samples, settled, reverse) for a, b in zip(calls, others, strict=True)]
        unchanged = [(a, b) for a, b in zip(calls, others, strict=True) if a[0] == b[0]]
        grown += len(calls) - len(unchanged)
        mixed += sum(not _close(a[1], b[1]) for a, b in unchanged)
        passed += sum(isinstance(verdict, View) for verdict in verdicts)
        if len(set(verdicts)) == 1:  # if the calls differ, the sizes of tensors decide for each
            found[place] = verdicts[0]
            if isinstance(verdicts[0], View) and not verdicts[0].dim and verdicts[0].order != "one":
                shares[place] = frozenset(shape[0] // samples for shape, _ in calls)
    return Found(dim, found, shares), passed, grown, mixed


def _compare(full: Digest, fewer: Digest, samples: int, trusted: int | None, reverse: bool) -> Verdict:
    """The verdict on one call of a layer: its input in the whole batch, and in the batch without the first sample."""

    def kept(values: Tensor, dim: int) -> Tensor:
        values = values.narrow(dim, 1, samples - 1)
        return values.flip(dim) if reverse else values

    (shape, values), (shape_fewer, values_fewer) = full, fewer
    if shape == shape_fewer:  # an embedding can handle one row of ids for all samples
        return None if len(shape) < 2 or shape[0] == 1 else NOT_THE_BATCH
    grown = [dim for dim, size in enumerate(shape) if len(shape) == len(shape_fewer) and size != shape_fewer[dim]]
    if len(grown) != 1 or grown[0] >= values.dim():
        return NOT_THE_BATCH
    dim = grown[0]
    share, rest = divmod(shape[dim], samples)
    if rest or shape_fewer[dim] != share * (samples - 1) or (dim and share > 1):
        return NOT_THE_BATCH
    if share == 1:
        same = _close(kept(values, dim), values_fewer)
        if same or dim == trusted:
            return View(dim, "last" if dim else "one")
        return NOT_VERIFIED
    first = _close(kept(values.view(samples, share, *values.shape[1:]), 0).flatten(0, 1), values_fewer)
    last = _close(kept(values.view(share, samples, *values.shape[1:]), 1).flatten(0, 1), values_fewer)
    if first == last:
        return EQUAL_ROWS if first else NOT_VERIFIED
    return View(0, "first" if first else "last")


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-4
    if torch.is_autocast_enabled(a.device.type) or a.dtype in (torch.float16, torch.bfloat16):
        tolerance = 2e-2
    elif a.is_cuda and a.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        tolerance = 5e-3
    a, b = (values if values.dtype == torch.float64 else values.float() for values in (a, b))
    if not torch.isfinite(torch.linalg.vector_norm(a)):
        raise CannotProbeError("the batch is not finite")
    usual = float(a.abs().median()) if a.numel() else 0.0
    if usual > 0:  # beside an outsized row, differences in all other rows would not show
        a, b = (values.clamp(-10 * usual, 10 * usual) for values in (a, b))
    size = torch.linalg.vector_norm(a)
    return bool(torch.linalg.vector_norm(a - b) <= tolerance * size)


@torch.no_grad()
def digest(x: Tensor) -> Digest:
    """The shape of a layer's input, and one number for each of its rows."""
    values = x.detach()
    values = values.to(torch.float64 if x.dtype == torch.float64 or not x.is_floating_point() else torch.float32)
    if x.is_floating_point() and x.dim() > 1:
        with torch.autocast(x.device.type, enabled=False):
            values = values @ torch.cos(1.7 * torch.arange(x.shape[-1], device=x.device, dtype=values.dtype) + 1)
    return tuple(x.shape), values.to(x.dtype) if x.is_floating_point() else values


def sizes_of(value: Any, samples: int, dim: int, key: str = "") -> dict[str, frozenset[int]]:
    """How many entries each input has for a sample, over its first dimensions: ``{T, T i}`` for ``[N, T, i]``.

    Counts the tensors that `resized` would change.
    """
    if isinstance(value, Tensor):
        for own in dict.fromkeys((dim, 0)):
            if value.dim() > own and value.shape[own] == samples:
                others = [*value.shape[:own], *value.shape[own + 1 :]]
                return {key: frozenset(accumulate(others, mul))}
        return {}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        items = vars(value).items() if hasattr(value, "__dict__") else ()
    return {path: size for name, one in items for path, size in sizes_of(one, samples, dim, f"{key}.{name}").items()}


def resized(value: Any, samples: int, dim: int, reverse: bool = False) -> Any:
    """The inputs without their first sample, the others in order or in reverse; a single sample is doubled.

    A tensor holds samples if dimension ``dim`` has ``samples`` entries, or else if dimension 0 has; a list, if it has
    ``samples`` items that hold none themselves. All else stays as it is.

    Raises CannotProbeError at an object of another kind, which may hold samples unseen.
    """
    if isinstance(value, Tensor):
        for own in dict.fromkeys((dim, 0)):
            if value.dim() > own and value.shape[own] == samples:
                others = torch.cat([value, value], own) if samples == 1 else value.narrow(own, 1, samples - 1)
                return others.flip(own) if reverse else others
        return value
    if value is None or isinstance(value, int | float | complex | str | bytes | torch.dtype | torch.device):
        return value
    if isinstance(value, list | tuple):
        return _resized_sequence(value, samples, dim, reverse)
    if isinstance(value, Mapping):
        items = {key: resized(one, samples, dim, reverse) for key, one in value.items()}
        if isinstance(value, UserDict):  # BatchEncoding
            encoding = copy.copy(value)
            encoding.data = items
            return encoding
        return items if type(value) is dict else type(value)(**items)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                object.__setattr__(made, field.name, resized(getattr(value, field.name), samples, dim, reverse))
        return made
    raise CannotProbeError(f"an input is of type {type(value).__name__}")


def _resized_sequence(value: Sequence[Any], samples: int, dim: int, reverse: bool) -> Any:
    items = [resized(one, samples, dim, reverse) for one in value]
    if all(a is b for a, b in zip(items, value, strict=True)) and len(value) == samples > 1:
        items = items[:0:-1] if reverse else items[1:]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
