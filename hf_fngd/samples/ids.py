"""Which sample each row or token of a batch belongs to, where the batch says so.

A column ``sample_ids`` says it outright. Packed sequences show it in ``position_ids`` that restart within a row, or in
``cu_seq_lens``, the cumulated lengths of a batch without padding (transformers' `DataCollatorWithFlattening`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_fngd.samples.rows import ROW_IS_SAMPLE, Labeled, View

COLUMN = "sample_ids"


class Ids:
    """Which of the N samples each row ``[B]``, or each token ``[B, T]``, of a micro-batch belongs to.

    Attributes:
        of: integers from 0 to N - 1.
        samples: N.
    """

    def __init__(self, of: Tensor, samples: int) -> None:
        self.of, self.samples = of, samples
        self._known: dict[tuple[int, str], Labeled] = {}

    @property
    def rows(self) -> int:
        """The number of rows of the batch, B."""
        return len(self.of)

    def locate(self, shape: tuple[int, ...], view: View | None) -> Labeled | None:
        """Which sample each row of a layer's input belongs to; None if its rows are neither the batch's nor its tokens.

        ``shape`` is the input's without the features, and ``view`` says where the batch is in it.
        """
        dim, order = view or ROW_IS_SAMPLE
        if self.of.dim() > 1:
            turned = order == "last"
            sizes = tuple(self.of.t().shape if turned else self.of.shape)
            if tuple(shape[:2]) == sizes and order != "first":
                dim = 1
            elif shape[:1] == (self.of.numel(),):
                dim = 0
            else:
                return None
            key = dim, "last" if turned else "first"
            if key not in self._known:
                self._known[key] = Labeled(dim, (self.of.t() if turned else self.of).flatten())
            return self._known[key]
        view = View(dim, order)
        rows = torch.Size(shape[: dim + 1]).numel() if len(shape) > dim else -1
        return Labeled(dim, view.of_rows(self.of, rows)) if view.fits(rows, self.rows) else None


def find_ids(kwargs: Mapping[str, Any], sample: Tensor, dim: int = 0) -> tuple[str, list[Tensor]] | None:
    """What a batch says about its samples: the kind of information, and the tensors that hold it.

    ``sample`` is the input that counts the batch, moved to dimension 0 from dimension ``dim``.

    Raises TypeError or ValueError where `COLUMN` is no column of ids.
    """
    ids = kwargs.get(COLUMN)
    if ids is not None:
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            kind = f"a tensor of {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"{COLUMN} is a tensor of integers, equal ones for one sample, and the batch has {kind}")
        ids = ids.t() if dim and ids.dim() == 2 else ids
        if ids.dim() not in (1, 2) or ids.shape != sample.shape[: ids.dim()]:
            raise ValueError(
                f"{COLUMN} has the shape {tuple(ids.shape)}, and belongs to an input of shape {tuple(sample.shape)}: "
                "give an id for each row [B], or for each token [B, T]"
            )
        return COLUMN, [ids]
    for key, value in kwargs.items():
        if key.startswith("cu_seq") and isinstance(value, Tensor) and value.dim() == 1 and "_k" not in key:
            return "lengths", [value]
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or sample.dim() < 2:
        return None
    if len(positions) not in (1, len(sample)) or positions.shape[1] != sample.shape[1]:
        return None
    masked = [mask] if isinstance(mask, Tensor) and mask.shape == sample.shape[:2] else []
    return "positions", [positions, *masked]


def is_one_row(kwargs: Mapping[str, Any], sample: Tensor) -> bool:
    """Whether a batch is one row of tokens with ids or bounds of its samples: one token fewer would show nothing."""
    bounds = any(isinstance(key, str) and key.startswith("cu_seq") for key in kwargs)
    return bounds or (COLUMN in kwargs and sample.dim() == 1)


def of_tokens(by: str, tensors: list[Tensor], sample: Tensor) -> bool:
    """Whether there is an id for each token ``[B, T]``, and not one for each row."""
    return (tensors[0].dim() if by == COLUMN else len(_tokens(sample))) > 1


def _tokens(sample: Tensor) -> torch.Size:
    rows = sample.dim() == 1 or (sample.dim() == 2 and sample.is_floating_point())
    return sample.shape[:1] if rows else sample.shape[:2]


def read_ids(by: str, tensors: list[Tensor], sample: Tensor) -> Ids | None:
    """Read the ids from what `find_ids` found; None if each row is one sample. The host waits for the device."""
    if by == COLUMN:
        known, of = torch.unique(tensors[0], return_inverse=True)
        return Ids(of, len(known))
    if by == "lengths":
        return _of_lengths(tensors[0], sample)
    positions = tensors[0].expand(sample.shape[:2])
    zeros = positions == 0
    starts = zeros.clone()
    # Of the zeros at a row's end all but the first are padding: they start no sample.
    starts[:, 1:] &= ~(zeros[:, :-1] & zeros.flip(1).long().cumprod(1).flip(1).bool()[:, 1:])
    if len(tensors) > 1:  # no sequence starts in padding on the left, or right behind it
        starts[:, 1:] &= (tensors[1][:, 1:] != 0) & (tensors[1][:, :-1] != 0)
    starts[:, 0] = True
    of = starts.flatten().cumsum(0) - 1
    samples = int(of[-1]) + 1 if len(of) else 0
    return Ids(of.view(starts.shape), samples) if samples > len(sample) else None


def _of_lengths(bounds: Tensor, sample: Tensor) -> Ids:
    shape = _tokens(sample)
    total = shape.numel()
    of = torch.bucketize(torch.arange(total, device=bounds.device), bounds[1:], right=True).to(sample.device)
    last = int(bounds[-1])
    if last > total:
        raise ValueError(
            f"the cumulated lengths of the batch's sequences end at {last}, its input has {total} tokens: pass the "
            "batch as the collator made it"
        )
    return Ids(of.view(shape), len(bounds) - 1 + (last < total))  # tokens beyond the last bound are padding
