"""Uneven numbers of batches: torch's Join context, in which a process that has no more of them follows the others.

Such a process shadows the exchange that ends each step of the others, and measures nothing. When all have ended, they
take over the state of the last one, as DistributedDataParallel does with the model.
"""

from abc import abstractmethod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from hf_fngd.distributed.environment import rank_and_world

_CURE = "with torch.distributed.algorithms.join.Join([model, optimizer]), the DistributedDataParallel model first"


class JoinState:
    """Where this process is in a Join context."""

    def __init__(self) -> None:
        self.config: Any = None  # torch's
        self.epoch_ended = False  # which waits for the slowest process
        self._left: Any = None  # torch's config of a context that is over, which DistributedDataParallel keeps
        self._seen = True  # whether a forward pass in that context showed it

    @property
    def active(self) -> bool:
        """Whether the context is entered, and not over."""
        return self.config is not None and bool(self.config.enable)

    def begin(self, config: Any) -> None:
        """Torch makes a context."""
        self.config = config
        if self.active:
            self._seen = False

    def enter(self, exchanges: bool) -> None:
        """A training forward pass begins. Raises RuntimeError where its model is in a Join context by itself."""
        wrapper: Any = DistributedDataParallel
        config = getattr(wrapper._get_active_ddp_module(), "_join_config", None)
        if self.active or not self._seen:  # what is not known is taken for the former
            self._left, self._seen = config, True
        elif exchanges and config is not None and config.enable and config is not self._left:
            raise RuntimeError(
                "the model is in a Join context without FNGD, which exchanges norms or sample weights in a step: a "
                f"process that has ended would leave the others waiting. Enter the context {_CURE}, in place of "
                'model.join(), or take sharing="uniform"'
            )

    def leave(self) -> bool:
        """The context is over; whether an epoch ended in it."""
        self.config = None
        ended, self.epoch_ended = self.epoch_ended, False
        return ended

    def announce(self, micro_batches: int, stepping: bool, device: torch.device) -> None:
        """Tell those that have ended what the step exchanges: nothing, where it is skipped.

        Raises RuntimeError where they would not be asked once for the step.
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
    """What the hook needs of an `hf_fngd.FNGDPreconditioner`."""

    joining: JoinState

    def follow_step(self, begun: int) -> None:
        """Do what belongs to a step of the other processes, in which so many micro-batches began."""

    def end_epoch(self) -> None:
        """An epoch ended."""

    @property
    def device(self) -> torch.device:
        """That of the model."""


class Joins(Joinable):
    """A place in a Join context: ``Join([model, self])``."""

    @property
    @abstractmethod
    def _follower(self) -> Follower:
        """The preconditioner."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the processes take over from the last one."""

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
        """For each step of the others."""
        if begun := _largest(0, self._follower.device):
            self._follower.follow_step(begun)

    def post_hook(self, is_last_joiner: bool) -> None:
        """All have ended."""
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
    """Of all processes; a collective."""
    found = torch.tensor([value], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)
