"""Share out whole matrices among processes: who works on which, and how a matrix gets there and back."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hf_fngd.distributed.exchange import with_cause
from hf_fngd.distributed.sharded import is_sharded, part, whole

Tensors = dict[int, Tensor]  # by their places in a list of tensors


class Kind(NamedTuple):
    """What tensors must have in common to be worked on together."""

    shape: torch.Size  # of the whole tensor
    matrices: int  # how many matrices the tensor consists of
    columns: int  # of each matrix
    height: int  # rows of a block of each matrix
    dtype: torch.dtype  # of a process's part
    device: torch.device  # of a process's part
    working: torch.dtype  # of the whole tensor while it is worked on

    @property
    def rows(self) -> int:
        """The rows of each matrix."""
        return self.shape.numel() // (self.matrices * self.columns)


def by_kind(places: Iterable[int], kinds: Mapping[int, Kind]) -> dict[Kind, list[int]]:
    """Sort places by the kinds of their tensors."""
    found: dict[Kind, list[int]] = {}
    for place in places:
        found.setdefault(kinds[place], []).append(place)
    return found


class Gathered:
    """Tensors that every process works on itself. A sharded one is gathered first.

    `collect` takes parts of the tensors ``given`` and returns those that are ``mine``, whole; `give_back` takes these
    and returns this process's parts of all ``members``. ``dtype`` is what `give_back` expects (None: the parts' own).
    """

    dtype: torch.dtype | None = None

    def __init__(self, tensors: Sequence[Tensor], members: Sequence[int]) -> None:
        self.members = self.given = self.mine = members
        self._tensors = tensors

    def collect(self, parts: Tensors) -> Tensors:
        """From parts to whole tensors. A collective."""
        return {m: whole(x, self._tensors[m]) for m, x in parts.items()}

    def give_back(self, wholes: Tensors) -> Tensors:
        """From whole tensors to parts. A collective."""
        return {m: part(x, self._tensors[m]) for m, x in wholes.items()}


class Owned:
    """Sharded tensors, each with one owner: one exchange brings the parts to the owners, another brings them back.

    The tensors are split along their first dimension over the group. The group's i-th process owns the i-th list of
    ``owned``. ``dtype`` is that of all exchanged tensors. The methods are those of `Gathered`.
    """

    def __init__(
        self, tensors: Sequence[Tensor], owned: Sequence[Sequence[int]], dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        self.dtype: torch.dtype | None = dtype
        self.members = self.given = list(chain(*owned))
        self.mine = owned[rank]
        like = tensors[self.members[0]]
        assert isinstance(like, DTensor)
        self._group, self._device = group, like.device_mesh.device_type  # the parts may be elsewhere
        self._shapes = {m: tensors[m].shape for m in self.members}
        self._sizes = {m: part_sizes(shape, world) for m, shape in self._shapes.items()}
        self._here = [self._sizes[m][rank] for m in self.members]
        # How many entries this process sends to each owner, and receives from each process for its own tensors.
        self._to_owners = [sum(self._sizes[m][rank] for m in some) for some in owned]
        self._from_holders = [sum(self._sizes[m][holder] for m in self.mine) for holder in range(world)]

    def collect(self, parts: Tensors) -> Tensors:
        """See `Gathered.collect`."""
        received = self._exchange([parts[m] for m in self.members], self._to_owners, self._from_holders)
        pieces = received.split_with_sizes(
            [size for sizes in zip(*(self._sizes[m] for m in self.mine), strict=True) for size in sizes]
        )
        count = len(self.mine)
        return {m: torch.cat(pieces[n::count]).view(self._shapes[m]) for n, m in enumerate(self.mine)}

    def give_back(self, wholes: Tensors) -> Tensors:
        """See `Gathered.give_back`."""
        pieces = (wholes[m].flatten().split_with_sizes(self._sizes[m]) for m in self.mine)
        received = self._exchange(list(chain(*zip(*pieces, strict=True))), self._from_holders, self._to_owners)
        parts = zip(self.members, received.split_with_sizes(self._here), strict=True)
        return {m: x.view(-1, *self._shapes[m][1:]) for m, x in parts}

    def _exchange(self, pieces: Sequence[Tensor], sent: list[int], received: list[int]) -> Tensor:
        flat = [x.flatten() if x.device.type == self._device else x.flatten().to(self._device) for x in pieces]
        own = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self._device)
        found = own.new_empty(sum(received))
        with with_cause():
            dist.all_to_all_single(found, own, received, sent, group=self._group)
        return found


class Replicated:
    """Tensors that every process holds whole, each with one owner, which works on it and sends the result to all.

    The group's i-th process owns the i-th list of ``owned``. ``dtype`` is that of all exchanged tensors. The methods
    are those of `Gathered`.
    """

    def __init__(
        self, tensors: Sequence[Tensor], owned: Sequence[Sequence[int]], dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        self.dtype: torch.dtype | None = dtype
        self.members = list(chain(*owned))
        self.given = self.mine = owned[dist.get_rank(group)]
        self._group, self._owned = group, owned
        self._like = {m: tensors[m] for m in self.members}

    def collect(self, parts: Tensors) -> Tensors:
        """See `Gathered.collect`. No collective."""
        return parts

    def give_back(self, wholes: Tensors) -> Tensors:
        """See `Gathered.give_back`."""
        received, under_way = [], []
        with with_cause():
            for owner, some in enumerate(self._owned):
                if some:
                    sizes = [self._like[m].numel() for m in some]
                    flat = (
                        torch.cat([wholes[m].flatten() for m in some])
                        if some is self.mine
                        else torch.empty(sum(sizes), dtype=self.dtype, device=self._like[some[0]].device)
                    )
                    source = dist.get_global_rank(self._group, owner)
                    under_way.append(dist.broadcast(flat, source, group=self._group, async_op=True))
                    received.append(zip(some, flat.split_with_sizes(sizes), strict=True))
            for one in under_way:
                one.wait()
        return {m: x.view(self._like[m].shape) for parts in received for m, x in parts}


def exchanges(
    tensors: Sequence[Tensor],
    kinds: Mapping[int, Kind],
    cost: Callable[[Kind], int],
    limit: int,
    replicas: Mapping[int, dist.ProcessGroup],
) -> Iterator[Gathered | Owned | Replicated]:
    """Split the tensors that have a kind into portions that are worked on one after another.

    The portions are the same on all processes. In a process a portion has at most ``limit`` bytes, or is one tensor.
    Two sorts of tensors are shared out among owners of about equal ``cost``: those that are split along their first
    dimension alone, over one dimension of their mesh (`Owned`), and those that are whole and have ``replicas``
    (`Replicated`). All others are `Gathered`.
    """
    groups: dict[int, dist.ProcessGroup] = {}  # the processes among whom a tensor is shared out
    for place in kinds:
        if over := _split_over(tensors[place]):
            groups[place] = over
        elif place in replicas and not is_sharded(tensors[place]):
            groups[place] = replicas[place]
    for places in by_kind((place for place in kinds if place not in groups), kinds).values():
        yield from (Gathered(tensors, some) for some in _in_portions(places, kinds, limit))
    together: dict[tuple[bool, dist.ProcessGroup, torch.dtype], list[int]] = {}
    for place, group in groups.items():
        together.setdefault((is_sharded(tensors[place]), group, kinds[place].working), []).append(place)
    for (sharded, group, dtype), places in together.items():
        owned = shared_out({place: cost(kinds[place]) for place in places}, dist.get_world_size(group))
        # Replicated tensors come back to every process from all owners at once.
        most = limit if sharded else limit // len(owned)
        for some in zip_longest(*(_in_portions(places, kinds, most) for places in owned), fillvalue=()):
            yield (Owned if sharded else Replicated)(tensors, some, dtype, group)


def shared_out(costs: Mapping[int, int], processes: int) -> list[list[int]]:
    """Share out keys among processes: the most costly key first, each to the process with the least to do."""
    owned: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for place in sorted(costs, key=costs.__getitem__, reverse=True):
        owner = loads.index(min(loads))
        owned[owner].append(place)
        loads[owner] += costs[place]
    return owned


def _in_portions(places: Iterable[int], kinds: Mapping[int, Kind], limit: int) -> Iterator[list[int]]:
    portion: list[int] = []
    taken = 0
    for place in places:
        size = kinds[place].shape.numel() * kinds[place].working.itemsize
        if portion and taken + size > limit:
            yield portion
            portion, taken = [], 0
        portion.append(place)
        taken += size
    if portion:
        yield portion


def _split_over(x: Tensor) -> dist.ProcessGroup | None:
    """The processes that hold the parts of a tensor, if it is split along its first dimension alone; else None."""
    if not isinstance(x, DTensor):
        return None
    split = [(dimension, one) for dimension, one in enumerate(x.placements) if not one.is_replicate()]
    # No subclass of Shard will do: none of them splits into consecutive rows.
    if len(split) != 1 or type(split[0][1]) is not Shard or split[0][1].dim or x.device_mesh.size(split[0][0]) == 1:
        return None
    group: dist.ProcessGroup = x.device_mesh.get_group(split[0][0])
    return group


def part_sizes(shape: torch.Size, world: int) -> list[int]:
    """How many entries each process holds. Rows are split as by `torch.chunk`; the last processes may get none."""
    rows = -(-shape[0] // world)
    return [shape[1:].numel() * max(0, min(rows, shape[0] - rank * rows)) for rank in range(world)]
