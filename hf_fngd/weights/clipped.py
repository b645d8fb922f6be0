"""``clipped``, the default: each sample's gradient is brought down to the step's mean norm, layer by layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fngd.distributed.exchange import rank_and_world, sum_over_processes
from hf_fngd.weights.algebra import clip, mean_norm, widest_dtype
from hf_fngd.weights.base import MicroBatchWeights, Samples, SharingPolicy, State, register_policy


class ClippedWeights(MicroBatchWeights):
    """The gradient norms and sample weights of one micro-batch, of ``parts`` in a step; both ``[N]`` by layer.

    A layer that is called twice has different norms in each call. It is not remembered: its norms are zeros.
    """

    def __init__(self, size: int, parts: int, means: Tensor) -> None:
        super().__init__(size)
        self.norms: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self._parts, self._means = parts, means

    def weigh(self, layer: int, samples: Samples) -> Tensor:
        norms = samples.norms()
        self.norms[layer] = torch.zeros_like(norms) if layer in self.norms else norms
        bound = mean_norm(norms)
        if self._parts > 1:
            known = self._means[layer].to(bound)
            own = torch.where(bound.isnan(), 0, bound)  # NaN: no sample has a gradient
            bound = torch.where(known == 0, bound, (own + (self._parts - 1) * known) / self._parts)
        w = self.weights[layer] = clip(norms, bound)
        return w

    def sums(self, like: Tensor) -> Tensor:
        """One row: the sums of the norms ``[P]``, the numbers of norms that are not 0 ``[P]``, and a one."""
        none = like.new_zeros(self.size)
        norms = torch.stack([self.norms.get(layer, none).to(like) for layer in range(len(like))])
        return torch.cat([norms.sum(dim=1), norms.count_nonzero(dim=1), norms.new_ones(1)])


@register_policy
class ClippedSharing(SharingPolicy):
    """Sample weights from the samples' gradient norms alone, in every step.

    If a sample's gradient is X times as long as those of the B - 1 others, it is ``1 + (X - 1) / B`` times as long
    afterwards. A bound that leaves no such lead (the median, say) would silence the few samples that a well fitted
    model has yet to learn: their gradients are outsized too. The norms are `LayerKernel.norms`. Norms of 0
    have no part in the mean.

    The batch is that of the optimizer step. If it comes in M micro-batches, of one process or of many, a micro-batch
    does not know the norms of the M - 1 others; the mean norm of the last step stands for theirs. Only then does a
    change of the loss's scale between two steps matter: the bound is too wide or too narrow for one step, as it may be
    for the last step of an epoch, which has fewer micro-batches.
    """

    name = "clipped"
    weighs_behind = True
    parts: int  # M
    means: Tensor  # mean norms in the last step of M micro-batches ``[P]``, by layer; 0 where none was ever known
    shorter: bool  # whether the last step had fewer micro-batches
    _last: list[dict[int, Tensor]]  # sample weights of the last step's micro-batches, by layer

    def prepare(self, layers: int, *, damping: float, coefficient_steps: int | None, memory_budget: int) -> None:
        super().prepare(layers, damping=damping, coefficient_steps=coefficient_steps, memory_budget=memory_budget)
        self.load_state_dict({})

    def begin(self, size: int, offset: int) -> ClippedWeights:
        return ClippedWeights(size, self.parts, self.means)

    def close(self, batches: Sequence[MicroBatchWeights], begun: int, like: Tensor) -> int:
        """See `SharingPolicy.close`. Communicates two numbers a layer where there are several processes."""
        own = [batch for batch in batches if isinstance(batch, ClippedWeights)]
        self._last = [batch.weights for batch in own]
        samples = super().close(batches, begun, like)
        if rank_and_world()[1] == 1 and max(len(own), self.parts) == 1:
            return samples
        like = like.new_empty(self.layers)
        rows = like.new_zeros(len(own), 2 * self.layers + 1, dtype=widest_dtype(like.device))
        for row, batch in zip(rows, own, strict=True):
            row.copy_(batch.sums(like))
        total = sum_over_processes(rows.sum(dim=0))
        micro_batches = int(total[-1])  # waits for the device
        if 0 < micro_batches < self.parts and not self.shorter:
            self.shorter = True  # probably an epoch's last step: not remembered, unless another short one follows
        elif micro_batches:
            self.parts, self.shorter = micro_batches, False
            sums, counts = total[:-1].view(2, -1).to(like)
            fresh = sums / counts
            self.means = torch.where(fresh.isfinite(), fresh, self.means.to(fresh))
        return samples * micro_batches

    def diagnostics(self) -> dict[str, float]:
        """Of this process's samples in the last step.

        ``weight_spread``, root mean square over the layers, and ``largest_norm``: the largest norm of a sample, in
        units of the bound, median over the layers; 1 where no sample was clipped.
        """
        layers = {layer for weights in self._last for layer in weights}
        every = [torch.cat([weights[layer] for weights in self._last if layer in weights]) for layer in layers]
        if not every:
            return {"weight_spread": 0.0, "largest_norm": 1.0}
        ratios = [(w.square().mean() / w.mean().square()).to(every[0]) for w in every]
        largest = torch.stack([1 / w.min().to(every[0]) for w in every]).median()
        spread = (torch.stack(ratios).mean() - 1).clamp(min=0).sqrt()
        return {"weight_spread": float(spread), "largest_norm": float(largest)}

    def state_dict(self) -> State:
        return {"parts": self.parts, "shorter": self.shorter, "means": self.means, "world": rank_and_world()[1]}

    def load_state_dict(self, state: State) -> None:
        """See `SharingPolicy.load_state_dict`. A new policy's state is empty, and so are those of older versions."""
        world = rank_and_world()[1]
        state = state or {"parts": 1, "shorter": False, "means": torch.zeros(self.layers), "world": world}
        if len(state["means"]) != self.layers:
            raise ValueError(
                f"the state is for {len(state['means'])} layers, this model has {self.layers} attached ones"
            )
        self.parts, self.shorter, self.means = state["parts"], state["shorter"], state["means"]
        self._last = []
        if world != state["world"]:  # gradients of a process's mean loss are R times those of the mean over R processes
            self.means = self.means * world / state["world"]
