"""Which process works on which whole matrix, and how the matrix gets there and back."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hf_fngd.distributed.exchange import with_cause
from hf_fngd.distributed.sharded import is_sharded, part, whole

Tensors = dict[int, Tensor]  # by their numbers


class Kind(NamedTuple):
    """What tensors have in common that are worked on together."""

    shape: torch.Size  # of a whole tensor
    matrices: int  # that it consists of
    columns: int  # of each matrix
    height: int  # rows of a block of each
    dtype: torch.dtype  # of the parts, and their device
    device: torch.device
    working: torch.dtype  # of the whole tensor

    @property
    def rows(self) -> int:
        """Of each matrix."""
        return self.shape.numel() // (self.matrices * self.columns)


def by_kind(places: Iterable[int], kinds: Mapping[int, Kind]) -> dict[Kind, list[int]]:
    """Those of each kind."""
    found: dict[Kind, list[int]] = {}
    for place in places:
        found.setdefault(kinds[place], []).append(place)
    return found


class Gathered:
    """Tensors that every process works on: each sharded one is gathered by itself."""

    dtype: torch.dtype | None = None  # that `give_back` takes; None for that of the parts

    def __init__(self, tensors: Sequence[Tensor], members: Sequence[int]) -> None:
        self.members = self.given = self.mine = members
        self._tensors = tensors

    def collect(self, parts: Tensors) -> Tensors:
        """From this process's parts of those ``given`` to those that are ``mine``, whole. A collective."""
        return {m: whole(x, self._tensors[m]) for m, x in parts.items()}

    def give_back(self, wholes: Tensors) -> Tensors:
        """From those that are ``mine``, whole, to this process's parts of the ``members``. A collective."""
        return {m: part(x, self._tensors[m]) for m, x in wholes.items()}


class Owned:
    """Tensors that one process each works on: one exchange brings their parts to the owners, one brings them back.

    They are split along their first dimension over the group, whose i-th process has the i-th of ``owned``. ``dtype``
    is that of all that is exchanged.
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
        # Entries that this process holds of each owner's tensors, and that each process holds of this one's.
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
    """Tensors that every process holds whole, and one each works on: it sends to all what it made.

    The i-th process of the group has the i-th of ``owned``. ``dtype`` is that of what is exchanged.
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
        """See `Gathered.collect`; no collective."""
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
    """Split the tensors that have a kind into some that are worked on at a time; the same on all processes.

    Those are at most ``limit`` bytes in a process, or one tensor. Owners of about equal ``cost`` get the tensors that
    are split along their first dimension alone, over one dimension of their mesh, and those that are not sharded and
    have ``replicas``; the others are `Gathered`.
    """
    groups: dict[int, dist.ProcessGroup] = {}  # of the processes among whom a tensor is shared out
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
        # What has been replicated comes back to all processes, from all owners at once.
        most = limit if sharded else limit // len(owned)
        for some in zip_longest(*(_in_portions(places, kinds, most) for places in owned), fillvalue=()):
            yield (Owned if sharded else Replicated)(tensors, some, dtype, group)


def shared_out(costs: Mapping[int, int], processes: int) -> list[list[int]]:
    """The keys that each process gets: the dearest first, each to whom has the least to do."""
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
    """The several processes that hold the parts of a tensor, where it is split along its first dimension alone."""
    if not isinstance(x, DTensor):
        return None
    split = [(dimension, one) for dimension, one in enumerate(x.placements) if not one.is_replicate()]
    # Of Shard's relatives none splits into consecutive rows.
    if len(split) != 1 or type(split[0][1]) is not Shard or split[0][1].dim or x.device_mesh.size(split[0][0]) == 1:
        return None
    group: dist.ProcessGroup = x.device_mesh.get_group(split[0][0])
    return group


def part_sizes(shape: torch.Size, world: int) -> list[int]:
    """How many entries each process holds: rows as `torch.chunk` splits them, and none where there are no more."""
    rows = -(-shape[0] // world)
    return [shape[1:].numel() * max(0, min(rows, shape[0] - rank * rows)) for rank in range(world)]
