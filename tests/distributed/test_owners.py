"""Who gets which matrix, and how many entries of it each process holds."""

import pytest
import torch

from hf_fngd.distributed.owners import part_sizes, shared_out


@pytest.mark.parametrize(
    ("costs", "owned"),
    [
        ({3: 1, 5: 1, 8: 1, 9: 1, 11: 1}, [[3, 8, 11], [5, 9]]),
        ({0: 1, 1: 2, 2: 5, 3: 2}, [[2], [1, 3, 0]]),
        ({0: 7}, [[0], []]),
    ],
)
def test_processes_get_about_equal_costs(costs: dict[int, int], owned: list[list[int]]) -> None:
    assert shared_out(costs, 2) == owned


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_parts_are_torch_chunks(world: int) -> None:
    for rows in range(1, 12):
        chunks = [chunk.numel() for chunk in torch.zeros(rows, 3).chunk(world)]
        assert part_sizes(torch.Size([rows, 3]), world) == chunks + [0] * (world - len(chunks))
