"""Which row of a layer's tensors belongs to which sample: by a rule (`View`) or by ids (`Labeled`).

A row is an entry of a tensor's first dimension, or of its first two flattened into one, ``[R, ...]``. Both classes
spread one value for each sample ``[N]`` over the rows ``[R]``, and make the samples' norms of the rows' norms.
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
    """Where the samples are in a layer's input, as the probe found.

    Attributes:
        dim: the dimension that holds them, of N entries or a multiple.
        order: "one" for one entry a sample. With several, "first" puts all entries of a sample together (shape
            ``[N, T]``), and "last" all entries of a position (``[T, N]``). For a ``dim`` beyond 0 it is "last", since
            the dimensions before it are flattened with it.
    """

    dim: int
    order: str

    @property
    def row_is_sample(self) -> bool:
        """Whether it is the layout that every kernel can handle: one entry a sample, in dimension 0."""
        return self.dim == 0 and self.order == "one"

    def fits(self, rows: int, samples: int) -> bool:
        """Whether so many rows can be those of so many samples."""
        return rows == samples if self.order == "one" else samples > 0 and rows >= 0 and rows % samples == 0

    def of_rows(self, w: Tensor, rows: int) -> Tensor:
        """Spread one value for each sample ``[N]`` over the rows ``[R]``."""
        if self.order == "one":
            return w
        times = rows // w.shape[0]
        return w.repeat_interleave(times, 0) if self.order == "first" else w.repeat(times, *[1] * (w.dim() - 1))

    def of_samples(self, norms: Tensor, samples: int, adds: bool) -> Tensor:
        """The samples' norms from their rows': the sum if ``adds``, else the root of the sum of squares."""
        if self.order == "one":
            return norms
        parts = norms.view(samples, -1) if self.order == "first" else norms.view(-1, samples).t()
        return parts.sum(dim=1) if adds else torch.linalg.vector_norm(parts, dim=1)

    def samples_first(self, x: Tensor, samples: int, rows: int) -> Tensor:
        """Bring a tensor ``[R ..., *]`` to the shape ``[N, T, *]``."""
        if self.order == "one":
            return x
        own = x.shape[1:] if len(x) == rows else (len(x) // rows, *x.shape[1:])
        if self.order == "first":
            return x.reshape(samples, rows // samples, *own)
        return x.reshape(rows // samples, samples, *own).transpose(0, 1)


class Labeled(NamedTuple):
    """The rows of one call, each with the id of its sample.

    Attributes:
        dim: the dimension that counts the rows, flattened with those before it.
        ids: from 0 to N - 1, ``[R]``.
    """

    dim: int
    ids: Tensor

    @property
    def row_is_sample(self) -> bool:
        """See `View.row_is_sample`."""
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
        scale = norms.amax().clamp(min=torch.finfo(norms.dtype).tiny)  # or else the squares may overflow
        return found.index_add_(0, self.ids, (norms / scale).square()).sqrt() * scale

    def samples_first(self, x: Tensor, samples: int, rows: int) -> Tensor:
        """See `View.samples_first`. T is the longest sample's; zeros fill the others up. The host waits."""
        x = x if len(x) == rows else x.reshape(rows, -1, *x.shape[1:])
        order = self.ids.argsort(stable=True)
        counts = self.ids.bincount(minlength=samples)
        ids = self.ids[order]
        place = torch.arange(rows, device=x.device) - (counts.cumsum(0) - counts)[ids]
        found = x.new_zeros(samples, int(counts.max()), *x.shape[1:])
        found[ids, place] = x[order]
        return found


class Shares(NamedTuple):
    """How many rows each sample had in the probe's batch, for a layer whose input folds samples and positions.

    In a later batch a share that equalled the size of one of the model's inputs must equal it again; any other share
    must be the same, or grow with an input. Otherwise the samples have unequal shares, even if N divides the rows.
    """

    rows: frozenset[int]  # a sample's, in each of the layer's calls
    sizes: Mapping[str, frozenset[int]]  # the model's inputs', see `hf_fngd.samples.inputs.sizes_of`

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
ROW_IS_SAMPLE = View(0, "one")
TOKENS = View(1, "first")  # in a compiled graph whose rows are tokens
