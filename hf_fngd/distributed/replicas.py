"""DistributedDataParallel: which processes hold the same parameters and gradients, and so can share out a step."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Wrapped(NamedTuple):
    """A forward pass within DistributedDataParallel.

    Attributes:
        replicas: the processes that are going to take the same step as this one. None where not all gradients are
            averaged over all of the wrapper's processes: under ``no_sync``, with communication hooks, with parameters
            that it ignores, and from the first Join context on, which processes leave.
    """

    replicas: dist.ProcessGroup | None


def wrapped() -> Wrapped | None:
    """The forward pass under way, where it is one; it is on all processes or on none."""
    wrapper: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    if wrapper is None:
        return None
    group: dist.ProcessGroup = wrapper.process_group
    ignored = wrapper.parameters_to_ignore and any(
        p.requires_grad for name, p in wrapper.module.named_parameters() if name in wrapper.parameters_to_ignore
    )
    averages = wrapper.require_backward_grad_sync and not (wrapper._comm_hooks or ignored)
    several = averages and not wrapper._join_config.enable and dist.get_world_size(group) > 1
    return Wrapped(group if several else None)
