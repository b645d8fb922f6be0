"""What several processes run for `tests.review.test_ranks`; each function returns what rank 0 reports."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hf_fngd import FNGD
from tests.nets import data, net

STEPS, MICRO_BATCHES = 3, 2


def fsdp2_accumulation() -> dict[str, Any]:
    """Rows that replay keeps where gradients are reduced, and weights put away, with the last micro-batch only."""
    found = {}
    for reshard in (True, False):
        for dtype in (None, torch.bfloat16):
            model = net(width=9, dtype=torch.float32)
            options = {} if dtype is None else {"mp_policy": MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)}
            fully_shard(model.fc1, reshard_after_forward=reshard, **options)
            fully_shard(model, reshard_after_forward=reshard, **options)
            fngd = FNGD(model, sharing="replay")
            for step in range(STEPS):
                for part in range(MICRO_BATCHES):
                    last = part == MICRO_BATCHES - 1
                    model.set_requires_gradient_sync(last)
                    model.set_reshard_after_backward(last)
                    x, y = data(5, 3, seed=100 * step + 10 * part + dist.get_rank(), dtype=torch.float32)
                    F.cross_entropy(model(x).float(), y).backward()
                fngd.step()
                fngd.zero_grad()
            found[f"reshard_after_forward={reshard}, {dtype}"] = fngd.preconditioner.policy.recorded
    return found


def main() -> None:
    *names, result = sys.argv[1:]
    dist.init_process_group("gloo")
    found = {name: globals()[name]() for name in names}
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
