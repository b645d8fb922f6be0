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
a recurrent layer). The dimension that explains more calls is taken.

Where calls are left unexplained, the passes are made once more with the same random numbers for every sample
(`hf_fngd.samples.draws`), since a model may draw some in evaluation mode too. Nothing of a pass remains
(`hf_fngd.samples.snapshot`).
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_fngd.samples.draws import same_draws
from hf_fngd.samples.inputs import CannotProbeError, copied, resized
from hf_fngd.samples.rows import NOT_THE_BATCH, View
from hf_fngd.samples.snapshot import untouched
from hf_fngd.weights.algebra import widest_dtype

NOT_VERIFIED = (
    "leaving out a sample of the first batch changed what the layer saw of the others, so its rows cannot be told apart"
)
EQUAL_ROWS = "samples and positions are folded, in an order that the first batches did not tell, as all rows were equal"
UNSURE = (
    "no dimension of the batch holds samples that leave each other alone, as where they attend to each other or are "
    "put in a random order; batch_dim=0 or 1 says which one it is"
)

Digest = tuple[tuple[int, ...], Tensor]
Calls = dict[int, list[Digest]]  # by the layer's place, in the order of its calls
Run = Callable[[Any, Any], Calls]  # runs the model on positional and named arguments, and returns what its layers saw
Verdict = View | str | None  # a view, or the reason why there is none; None: the batch shares it


class Found(NamedTuple):
    """What a probe found.

    Attributes:
        dim: the batch's dimension in the model's inputs.
        verdicts: one for each layer that was called, by its place.
        shares: of layers whose samples have several rows, how many a sample had in each call.
        calls: how often each of these layers was called.
    """

    dim: int
    verdicts: dict[int, Verdict]
    shares: dict[int, frozenset[int]]
    calls: dict[int, int]


class Outcome(NamedTuple):
    """What probing one dimension found; how many calls kept their values, grow with it, or change without growing."""

    found: Found
    passed: int
    grown: int
    mixed: int

    @property
    def told_all(self) -> bool:
        """Whether no call hides its samples."""
        return self.passed == self.grown and not self.mixed


def probe(
    model: nn.Module,
    run: Run,
    inputs: tuple[Any, Any],
    sample: Tensor,
    batch_dim: int | None,
    known: int | None = None,
    own: Any = None,
) -> Found:
    """Find the samples in the inputs of a model's layers.

    Args:
        model: the model.
        run: see `Run`.
        inputs: the positional and named arguments of the current forward pass.
        sample: the input that counts the samples.
        batch_dim: the dimension in which it does, if the user said so.
        known: the dimension that an earlier probe found.
        own: the model's forward, if that may keep something.

    Raises:
        CannotProbeError: see there. Any error of the model on a batch of another size comes through as well.
    """
    if torch._C._get_tracing_state() is not None:
        raise CannotProbeError("torch.jit.trace is under way")
    only = known if batch_dim is None else batch_dim
    dims = [only] if only is not None else [0, 1][: 1 if len(sample) == 1 else sample.dim()]
    best, most = Found(dims[0], {}, {}, {}), -1
    failure: Exception | None = None
    with untouched(model, own=own):
        for dim in dims:
            try:
                outcome = _try(run, inputs, sample.shape[dim], dim, trusted=batch_dim is not None)
            except Exception as error:  # whatever a model does with inputs of other sizes
                failure = error if dim == dims[0] else failure
                continue
            found, passed, grown, _ = outcome
            enough = passed == grown if dim or sample.dim() < 2 else 2 * passed > grown
            if len(sample) == 1:  # all rows are that sample's, whatever the copies showed
                for place in [place for place, one in found.verdicts.items() if isinstance(one, str)]:
                    del found.verdicts[place]
            elif not (enough or only is not None):
                found.verdicts.update({place: UNSURE for place, one in found.verdicts.items() if one is not None})
                passed = 0
            if passed > most:
                best, most = found, passed
            if outcome.told_all:
                break
    if failure is not None and not most > 0:
        raise failure
    return best


def _try(run: Run, inputs: tuple[Any, Any], samples: int, dim: int, trusted: bool) -> Outcome:
    """Probe one dimension; where random numbers may hide the samples, once more with the same ones for all of them."""
    found = _compared(run, inputs, samples, dim, trusted)
    if found.told_all:
        return found
    try:
        again = _compared(run, inputs, samples, dim, trusted, alike=True)
    except Exception:  # whatever a model does beside torch's operators
        return found
    return again if again.passed > found.passed else found


def _compared(run: Run, inputs: tuple[Any, Any], samples: int, dim: int, trusted: bool, alike: bool = False) -> Outcome:
    """Run the model twice, and compare what its layers saw."""

    def run_on(given: Any, count: int) -> Calls:
        with same_draws(count, dim) if alike else contextlib.nullcontext():
            return run(*given)

    own: tuple[Any, Any] = copied(inputs)  # the current forward pass has yet to run on the originals
    reverse = samples > 1
    if reverse:
        seen = run_on(own, samples)
        try:
            seen_fewer = run_on(resized(copied(inputs), samples, dim, reverse=True), samples - 1)
        except Exception:  # packed sequences, say, have to be sorted by length
            reverse = False
            seen_fewer = run_on(resized(copied(inputs), samples, dim), samples - 1)
    else:
        seen, seen_fewer = run_on(resized(copied(inputs), samples, dim), 2), run_on(own, 1)
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
    return Outcome(
        Found(dim, found, shares, {place: len(calls) for place, calls in seen.items()}), passed, grown, mixed
    )


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


def is_coarse(model: nn.Module) -> bool:
    """Whether a part of the model computes in half precision, or quantized: its rounding may depend on the batch."""
    return any(p.element_size() < 4 for p in model.parameters())


@torch.no_grad()
def digest(x: Tensor, coarse: bool = False) -> Digest:
    """The shape of a layer's input, and one number for each of its rows; in bfloat16 where the model `is_coarse`."""
    values = x.detach()
    exact = x.dtype == torch.float64 or not x.is_floating_point()
    values = values.to(widest_dtype(x.device) if exact else torch.float32)
    if x.is_floating_point() and x.dim() > 1:
        with torch.autocast(x.device.type, enabled=False):
            values = values @ torch.cos(1.7 * torch.arange(x.shape[-1], device=x.device, dtype=values.dtype) + 1)
    if x.is_floating_point():
        values = values.to(torch.bfloat16 if coarse and x.dtype == torch.float32 else x.dtype)
    return tuple(x.shape), values
