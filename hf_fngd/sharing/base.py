"""How coefficients outlive the step that computed them: the policy interface and the registry.

A policy that knows what a sample weighs from the norms of its batch says so in `weigh`, asked first in every step; of
a step in several micro-batches it is told the norms afterwards (`remember`). All others solve for weights in
coefficient steps, and share them in the rest. They see whole micro-batches: ``w`` is ``[L, N]``, one row of weights for
each of the L preconditioned layers. Four calls, in the order in which a run makes them:

* coefficient step: `encode` (in backward, a layer at a time) brings a layer's fresh weights into the order
  in which the policy keeps them, `commit` (in the optimizer's step, all layers at once) stores them;
* shared step: `lookup` (before forward, all layers at once) fetches the stored weights for a batch, `decode`
  (in backward, a layer at a time, and for embeddings and tied heads the mean over the layers) brings them into
  the order of the batch at hand.

Whatever a batch's N, the weights that `lookup` and `decode` yield have mean 1 in every layer; those of `weigh` are at
most 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_fngd.coefficients import Coefficients, coefficients

State = dict[str, Any]


@dataclass(frozen=True)
class BatchInfo:
    """What a policy may know of a micro-batch before its forward pass.

    Attributes:
        size: number of samples N.
        place: how many micro-batches came before it since the epoch (or the sharing phase) began.
        index: dataset indices of its samples ``[N]`` (int64), where the dataset carries them, else None.
    """

    size: int
    place: int
    index: Tensor | None = None


class SharingPolicy:
    """A rule that reuses coefficients; subclasses are registered with `register_policy`.

    Class attributes:
        name: what the argument ``sharing`` calls it.
        always: True where every step is a coefficient step.
        natural: False where the weights are not those of Eq. 9: coefficient steps then serve rho alone.
        needs_norms: True where `weigh`, or `encode` and `decode`, read the sample norms.
        needs_index: True where the dataset has to carry an index column.
        follows: True where a stored weight follows its sample, or samples of its kind, into any other batch. Then
            `lookup` is called before coefficient steps too, for the samples' weights in embeddings and tied heads.
    """

    name: ClassVar[str]
    always: ClassVar[bool] = False
    natural: ClassVar[bool] = True
    needs_norms: ClassVar[bool] = False
    needs_index: ClassVar[bool] = False
    follows: ClassVar[bool] = False

    def prepare(self, layers: int, coefficient_steps: int, memory_budget: int, rest: int = 0) -> None:
        """Called when the policy is attached to a model; forgets what it kept of another one.

        Args:
            layers: number of preconditioned layers L.
            coefficient_steps: the cap of the first-epoch phase, in steps.
            memory_budget: bound of the store in bytes.
            rest: number of modules outside of the layers whose samples are weighed; P is that of both together.
        """
        self.layers = layers

    def reduce(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What a coefficient step forms one layer's Gram matrix from (default: all of it).

        Args:
            a: inputs ``[N, T, i]``, in float32 or better.
            g: output gradients ``[N, T, o]``, likewise.

        Returns:
            Both, with fewer features.
        """
        return a, g

    def solve(self, k: Tensor, damping: float) -> Coefficients:
        """What a coefficient step takes from one layer's Gram matrix ``[N, N]``."""
        return coefficients(k, damping)

    def weigh(self, norms: Tensor | None, place: int) -> Tensor | None:
        """A layer's weights ``[N]`` in any step, where the norms of the batch tell them; otherwise None.

        Args:
            norms: those of the micro-batch's samples ``[N]``, where the policy needs them.
            place: the layer, or the module of the rest behind the layers, in [0, P).
        """
        return None

    def wants_norms(self, micro_batches: int) -> bool:
        """Whether `remember` is to be called after a step, for which the policy has to need norms.

        Args:
            micro_batches: how many this process did; with several processes all of them have to be told the same.
        """
        return False

    def remember(self, sums: Tensor, counts: Tensor, micro_batches: int) -> None:
        """A step was taken; alike on all processes.

        Args:
            sums: of the norms that `weigh` was given ``[P]``, over all micro-batches of the step and all processes.
            counts: of those among them that are not 0 ``[P]``.
            micro_batches: how many there were.
        """

    def encode(self, w: Tensor, norms: Tensor | None) -> Tensor:
        """One layer's fresh weights ``[N]``, in the order that the store keeps (default: the batch's)."""
        return w

    def decode(self, w: Tensor, norms: Tensor | None) -> Tensor:
        """The inverse of `encode` for the batch at hand, ``[N]`` to ``[N]``."""
        return w

    def lookup(self, batch: BatchInfo) -> Tensor | None:
        """Stored weights ``[L, N]`` for a shared step; None where there are none (w = 1, or those of `weigh`)."""
        return None

    def commit(self, w: Tensor, valid: Tensor, batch: BatchInfo) -> None:
        """Store encoded weights (default: nothing is stored).

        Args:
            w: ``[L, N]``, in float32 or better.
            valid: ``[L]``, False where a layer's coefficients were unusable (its stored ones must survive).
            batch: the micro-batch that they come from.
        """

    def state_dict(self) -> State:
        """Tensors and numbers only, loadable with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: the state was written for another number of layers.
        """


_POLICIES: dict[str, Callable[[], SharingPolicy]] = {}


def register_policy(policy: type[SharingPolicy]) -> type[SharingPolicy]:
    """Class decorator: make a policy available by its name.

    Raises:
        ValueError: the name is taken.
    """
    if policy.name in _POLICIES:
        raise ValueError(f"there is already a sharing policy named {policy.name!r}")
    _POLICIES[policy.name] = policy
    return policy


def policy_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_POLICIES))


def make_policy(sharing: str | SharingPolicy) -> SharingPolicy:
    """A policy from its name; an object passes through.

    Raises:
        ValueError: the name is unknown; the message lists those that exist.
    """
    if isinstance(sharing, SharingPolicy):
        return sharing
    if sharing not in _POLICIES:
        raise ValueError(f"sharing={sharing!r} is not a policy; there are {', '.join(policy_names())}")
    return _POLICIES[sharing]()


def with_mean_one(w: Tensor) -> Tensor:
    """Bring the weights of each layer ``[..., N]`` to mean 1.

    By a factor of at most 2, and beyond that by a shift: at low damping some weights are negative, and a few of
    them can have a mean near 0, by which nothing should be divided.
    """
    mean = w.mean(dim=-1, keepdim=True)
    divisor = mean.clamp(min=0.5)
    return w / divisor + (1 - mean / divisor)


def cycle_to(w: Tensor, size: int) -> Tensor:
    """The first ``size`` of the weights ``[..., M]``, again from the first where they run out."""
    return w if w.shape[-1] == size else w[..., torch.arange(size, device=w.device) % w.shape[-1]]


def repeat_to(w: Tensor, size: int) -> Tensor:
    """Fit weights in batch order ``[..., M]`` to another N: `cycle_to`, and mean 1.

    Samples of a shuffled batch have no order to interpolate in, so a prefix is as good as any other choice.
    """
    return w if w.shape[-1] == size else with_mean_one(cycle_to(w, size))


def interpolate_to(w: Tensor, size: int) -> Tensor:
    """Fit weights in rank order ``[..., M]`` to another N by linear interpolation over quantiles, mean 1."""
    m = w.shape[-1]
    if m == size:
        return w
    quantiles = (torch.arange(size, device=w.device, dtype=w.dtype) + 0.5) / size
    places = (quantiles * m - 0.5).clamp(0, m - 1)
    low = places.floor().long()
    high = (low + 1).clamp(max=m - 1)
    return with_mean_one(torch.lerp(w[..., low], w[..., high], places - low))


def check_layers(found: int, expected: int) -> None:
    """Refuse a stored state of another model.

    Raises:
        ValueError: the numbers of layers differ.
    """
    if found != expected:
        raise ValueError(
            f"the stored coefficients are for {found} layers, this model has {expected} preconditioned layers; "
            "build the optimizer with the target_modules and exclude_modules that the checkpoint was made with"
        )
