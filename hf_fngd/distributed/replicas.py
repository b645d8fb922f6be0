"""DistributedDataParallel: which processes hold the same parameters and gradients, and so can share out a step."""

from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def replicas() -> dist.ProcessGroup | None:
    """The processes that are going to take the same step as this one; to be called in the model's forward pass.

    None without DistributedDataParallel, and where it does not average all gradients over all of its processes in the
    backward pass: under ``no_sync``, with communication hooks, with parameters that it ignores, and from the first Join
    context on, which processes leave.
    """
    wrapper: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is None or not wrapper.require_backward_grad_sync or wrapper._join_config.enable:
        return None
    if wrapper._comm_hooks or wrapper.parameters_to_ignore:
        return None
    group: dist.ProcessGroup = wrapper.process_group
    return group if dist.get_world_size(group) > 1 else None
