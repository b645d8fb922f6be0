"""Which rows of a layer's tensors belong to which sample: told by the place of the samples, or by ids.

A row is an entry of a tensor's first dimension, or of its first two in one, ``[R, ...]``. Both ways bring something for
each sample, as sample weights ``[N]``, to the rows ``[R]``, and the norms of the rows ``[R]`` to those of the samples.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NOT_THE_BATCH = "the first dimension of its input is not the batch"
NO_EQUAL_SHARES = (
    "the samples have equal numbers of its rows in some batches only, as in a model that drops padding inside (pack "
    "such batches before, with position_ids or cu_seq_lens, and they are weighed)"
)


class View(NamedTuple):
    """Where the samples are in a layer's input, as a probe told.

    They are in one dimension, of N entries or of several times as many: "one" entry each, or each sample's entries in a
    row ("first": the sample counts before its positions), or those of a position ("last"). Of another dimension than
    the first the order is "last", once it is flattened with those before it.
    """

    dim: int
    order: str

    @property
    def plain(self) -> bool:
        """Whether it is the layout that every kernel knows."""
        return self.dim == 0 and self.order == "one"

    def fits(self, rows: int, samples: int) -> bool:
        """Whether so many rows can be those of so many samples."""
        return rows == samples if self.order == "one" else samples > 0 <= rows and rows % samples == 0

    def of_rows(self, w: Tensor, rows: int) -> Tensor:
        """Something for each sample, for each row."""
        if self.order == "one":
            return w
        times = rows // w.shape[0]
        return w.repeat_interleave(times, 0) if self.order == "first" else w.repeat(times, *[1] * (w.dim() - 1))

    def of_samples(self, norms: Tensor, samples: int, adds: bool) -> Tensor:
        """The norms of the samples from those of their rows: their sum, or the root of the sum of their squares."""
        if self.order == "one":
            return norms
        parts = norms.view(samples, -1) if self.order == "first" else norms.view(-1, samples).t()
        return parts.sum(dim=1) if adds else torch.linalg.vector_norm(parts, dim=1)

    def samples_first(self, x: Tensor, samples: int, rows: int) -> Tensor:
        """A tensor ``[R ..., *]`` as ``[N, T, *]``."""
        if self.order == "one":
            return x
        own = x.shape[1:] if len(x) == rows else (len(x) // rows, *x.shape[1:])
        if self.order == "first":
            return x.reshape(samples, rows // samples, *own)
        return x.reshape(rows // samples, samples, *own).transpose(0, 1)


class Labeled(NamedTuple):
    """Rows that say by an id to which of the samples they belong, those of one call.

    ``dim`` counts the rows, in one with the dimensions before it; ``ids`` ``[R]`` are from 0 to N - 1.
    """

    dim: int
    ids: Tensor

    @property
    def plain(self) -> bool:
        """See `View.plain`."""
        return False

    def fits(self, rows: int, samples: int) -> bool:
        """See `View.fits`."""
        return rows == len(self.ids)

    def of_rows(self, w: Tensor, rows: int) -> Tensor:
        """See `View.of_rows`."""
        return w[self.ids]

    def of_samples(self, norms: Tensor, samples: int, adds: bool) -> Tensor:
        """See `View.of_samples`."""
        found = norms.new_zeros(samples)
        if adds or norms.numel() == 0:
            return found.index_add_(0, self.ids, norms)
        scale = norms.amax().clamp(min=torch.finfo(norms.dtype).tiny)  # whose square may be no number
        return found.index_add_(0, self.ids, (norms / scale).square()).sqrt() * scale

    def samples_first(self, x: Tensor, samples: int, rows: int) -> Tensor:
        """See `View.samples_first`; T is the longest sample's, and zeros fill up the others. Waits for the device."""
        x = x if len(x) == rows else x.reshape(rows, -1, *x.shape[1:])
        order = self.ids.argsort(stable=True)
        counts = self.ids.bincount(minlength=samples)
        ids = self.ids[order]
        place = torch.arange(rows, device=x.device) - (counts.cumsum(0) - counts)[ids]
        found = x.new_zeros(samples, int(counts.max()), *x.shape[1:])
        found[ids, place] = x[order]
        return found


class Shares(NamedTuple):
    """How many rows of a layer's input each sample had where a probe told them apart, and how large its inputs were.

    Of a layer whose input has samples and positions folded. A share that was as large as one of the model's inputs
    stays so; any other is constant, or grows with one. Else the shares are not equal, though N may divide the rows.
    """

    rows: frozenset[int]  # of each call
    sizes: Mapping[str, frozenset[int]]  # see `hf_fngd.samples.probe.sizes_of`

    def allow(self, rows: int, sizes: Mapping[str, frozenset[int]]) -> bool:
        """Whether a sample can have so many rows in a batch whose inputs have these sizes."""
        return any(self._allows(own, rows, sizes) for own in self.rows)

    def _allows(self, own: int, rows: int, sizes: Mapping[str, frozenset[int]]) -> bool:
        same = [key for key, known in self.sizes.items() if own in known and key in sizes]
        if same:
            return any(rows in sizes[key] for key in same)
        grown = [(max(known), max(sizes[key])) for key, known in self.sizes.items() if sizes.get(key) and known]
        return rows == own or any(rows * before == own * now for before, now in grown)


Rows = View | Labeled
PLAIN = View(0, "one")
TOKENS = View(1, "first")  # in a traced graph, where the rows are tokens
