"""The interface of a sharing policy, which says how much each sample of a micro-batch counts, and the registry.

The engine calls a policy three times. `SharingPolicy.begin` opens a micro-batch, before its forward pass.
`MicroBatchWeights.weigh` returns one layer's sample weights, in backward, when the layer's output gradient is there.
`SharingPolicy.close` ends the optimizer step with all of its micro-batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

State = dict[str, Any]


class Samples(Protocol):
    """What a policy may ask about the samples in one call of one layer. Each answer is computed on demand."""

    def norms(self) -> Tensor:
        """The norms of the per-sample gradients ``[N]``, by the layer type's cheap measure."""

    def gram(self, memory_budget: int) -> Tensor:
        """Their Gram matrix K ``[N, N]``, up to one factor, within a temporary memory in bytes."""


class MicroBatchWeights(ABC):
    """The sample weights of one micro-batch of ``size`` samples, N."""

    def __init__(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def weigh(self, layer: int, samples: Samples) -> Tensor | None:
        """One layer's sample weights ``[N]``, by its place among the attached layers; None means ones."""


class StoredWeights(MicroBatchWeights):
    """Sample weights ``[L, N]`` that are known before the micro-batch begins; None means ones."""

    def __init__(self, size: int, w: Tensor | None = None) -> None:
        super().__init__(size)
        self._w = w

    def weigh(self, layer: int, samples: Samples) -> Tensor | None:
        return None if self._w is None else self._w[layer]


class SharingPolicy(ABC):
    """Decides how much each sample counts. One object serves one model."""

    name: ClassVar[str]  # its name in the argument ``sharing``
    solves: ClassVar[bool] = False  # whether it solves Eq. 9, so that a layer type has to form Gram matrices
    compares: ClassVar[bool] = True  # whether a sample's weights depend on other samples
    weighs_behind: ClassVar[bool] = False  # whether layers before a BatchNorm leave the weighing to one behind it
    reads: ClassVar[tuple[str, ...]] = ()  # the arguments it uses, of "damping", "coefficient_steps", "memory_budget"

    def prepare(self, layers: int, *, damping: float, coefficient_steps: int | None, memory_budget: int) -> None:
        """Get ready for a model with so many attached layers, and forget any other. The rest are FNGD's arguments."""
        self.layers = layers

    @property
    def awaits_epoch(self) -> bool:
        """Whether the end of the current epoch changes the sample weights (default: it never does)."""
        return False

    @property
    def exchanges(self) -> bool:
        """Whether `close` communicates in the current step (default: it may)."""
        return True

    @abstractmethod
    def begin(self, size: int, offset: int) -> MicroBatchWeights:
        """A forward pass of N = ``size`` samples begins, after ``offset`` others of the step in all processes."""

    def close(self, batches: Sequence[MicroBatchWeights], begun: int, like: Tensor) -> int:
        """The optimizer steps. All processes call this, and it may communicate.

        Args:
            batches: this process's micro-batches whose backward pass is complete.
            begun: how many micro-batches began, in all processes.
            like: a tensor with the sample weights' dtype and device.

        Returns:
            How many samples the sample weights compared with each other.
        """
        return max((batch.size for batch in batches), default=0)

    def end_epoch(self) -> None:  # noqa: B027
        """An epoch ended. Idempotent."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers for the log; the host waits for the device."""
        return {}

    def state_dict(self) -> State:
        """The state: only tensors, numbers, strings, lists and dictionaries, so that ``weights_only=True`` loads it."""
        return {}

    def load_state_dict(self, state: State) -> None:  # noqa: B027
        """The inverse of `state_dict`. Raises ValueError, and loads nothing, if the state is for other layers."""


_POLICIES: dict[str, type[SharingPolicy]] = {}


def register_policy(policy: type[SharingPolicy]) -> type[SharingPolicy]:
    """Class decorator: make a policy available by its name. Raises ValueError where the name is taken."""
    if policy.name in _POLICIES:
        raise ValueError(f"there is already a sharing policy named {policy.name!r}")
    _POLICIES[policy.name] = policy
    return policy


def policy_names(holds: Callable[[type[SharingPolicy]], bool] = lambda policy: True) -> tuple[str, ...]:
    """The names of the registered policies that meet a condition (default: all), sorted."""
    return tuple(sorted(name for name, policy in _POLICIES.items() if holds(policy)))


def policy_class(sharing: str | SharingPolicy) -> type[SharingPolicy]:
    """The policy's class for the argument ``sharing``. Raises ValueError where the name is unknown."""
    if isinstance(sharing, SharingPolicy):
        return type(sharing)
    if sharing not in _POLICIES:
        raise ValueError(f"sharing={sharing!r} is not a policy; there are {', '.join(policy_names())}")
    return _POLICIES[sharing]
