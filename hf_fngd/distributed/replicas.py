"""DistributedDataParallel: which processes have the same parameters and gradients, and so can share a step's work."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Wrapped(NamedTuple):
    """A forward pass within DistributedDataParallel.

    Attributes:
        replicas: the processes that will take the same step as this one. None if some gradient is not averaged over
            all of the wrapper's processes: under ``no_sync``, with communication hooks, with ignored parameters, and
            from the first Join context on, since processes leave it.
    """

    replicas: dist.ProcessGroup | None


def wrapped() -> Wrapped | None:
    """The current forward pass, if it runs within DistributedDataParallel; all processes get the same answer."""
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
