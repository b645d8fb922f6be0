"""Uneven numbers of batches: in torch's Join context a process without further batches follows the others.

Such a process takes part in the exchange that ends each step of the others, and measures nothing. When all processes
have ended, they take over the state of the last one, as DistributedDataParallel does with the model.
"""

from abc import abstractmethod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from hf_fngd.distributed.exchange import rank_and_world

_CURE = "with torch.distributed.algorithms.join.Join([model, optimizer]), the DistributedDataParallel model first"


class JoinState:
    """Where this process is in a Join context."""

    def __init__(self) -> None:
        self.config: Any = None  # torch's
        self.epoch_ended = False  # whether an epoch ended; the policy hears of it when the slowest process is done
        self._left: Any = None  # torch's config of a context that is over; DistributedDataParallel keeps it
        self._seen = True  # whether a forward pass has shown the current context

    @property
    def active(self) -> bool:
        """Whether this runs inside a context."""
        return self.config is not None and bool(self.config.enable)

    def begin(self, config: Any) -> None:
        """A context begins."""
        self.config = config
        if self.active:
            self._seen = False

    def enter(self, exchanges: bool) -> None:
        """A training forward pass begins. Raises RuntimeError where only the model is in a Join context."""
        wrapper: Any = DistributedDataParallel
        config = getattr(wrapper._get_active_ddp_module(), "_join_config", None)
        if self.active or not self._seen:  # not seen yet counts as active
            self._left, self._seen = config, True
        elif exchanges and config is not None and config.enable and config is not self._left:
            raise RuntimeError(
                "the model is in a Join context without FNGD, which exchanges norms or sample weights in a step: a "
                f"process that has ended would leave the others waiting. Enter the context {_CURE}, in place of "
                'model.join(), or take sharing="uniform"'
            )

    def leave(self) -> bool:
        """The context ends; returns whether an epoch ended in it."""
        self.config = None
        ended, self.epoch_ended = self.epoch_ended, False
        return ended

    def announce(self, micro_batches: int, stepping: bool, device: torch.device) -> None:
        """Tell the processes that have ended what the step exchanges; a skipped step exchanges nothing.

        Raises RuntimeError where they would not be called exactly once for the step.
        """
        if not self.active:
            return
        if self.config.is_first_joinable:
            raise RuntimeError(f"FNGD is the first of the Join context: enter it {_CURE}")
        if micro_batches != 1:
            raise RuntimeError(
                f"the step has {micro_batches} forward passes, and a Join context takes one: leave out accumulation, "
                "or Join"
            )
        _largest(rank_and_world()[1] if stepping else 0, device)


class Follower(Protocol):
    """What the join hook needs of an `hf_fngd.FNGDPreconditioner`."""

    joining: JoinState

    def follow_step(self, begun: int) -> None:
        """Follow a step of the other processes, in which ``begun`` micro-batches began."""

    def end_epoch(self) -> None:
        """An epoch ended."""

    @property
    def device(self) -> torch.device:
        """The model's device."""


class Joins(Joinable):
    """A place in a Join context: ``Join([model, self])``."""

    @property
    @abstractmethod
    def _follower(self) -> Follower:
        """The preconditioner."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state that the processes take over from the last one."""

    @abstractmethod
    def load_state_dict(self, state_dict: Any) -> None:
        """The inverse of `state_dict`."""

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """See `torch.distributed.algorithms.join.Joinable`."""
        return _Hook(self)

    @property
    def join_device(self) -> torch.device:
        """See `torch.distributed.algorithms.join.Joinable`."""
        return self._follower.device

    @property
    def join_process_group(self) -> Any:
        """See `torch.distributed.algorithms.join.Joinable`."""
        return dist.group.WORLD

    @property
    def _join_config(self) -> Any:
        return self._follower.joining.config

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        self._follower.joining.begin(config)


class _Hook(JoinHook):
    def __init__(self, owner: Joins) -> None:
        self._owner, self._follower = owner, owner._follower

    def main_hook(self) -> None:
        """Runs for each step of the others."""
        if begun := _largest(0, self._follower.device):
            self._follower.follow_step(begun)

    def post_hook(self, is_last_joiner: bool) -> None:
        """Runs when all processes have ended."""
        follower, (rank, world) = self._follower, rank_and_world()
        if follower.joining.leave():
            follower.end_epoch()
        if world == 1:
            return
        source = _largest(rank if is_last_joiner else -1, follower.device)
        message = [_pytree.tree_map_only(Tensor, Tensor.cpu, self._owner.state_dict()) if rank == source else None]
        dist.broadcast_object_list(message, source)
        if rank != source:
            self._owner.load_state_dict(message[0])


def _largest(value: int, device: torch.device) -> int:
    """The largest value of all processes. A collective."""
    found = torch.tensor([value], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)
