"""Undo what a forward pass may change beside its output: inputs, modules, random states."""

import contextlib
import logging
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Hooks of these libraries are a part of a model's forward pass. Other hooks watch it, and must not see a probe.
_LIBRARIES = ("torch", "transformers", "peft", "accelerate")
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_DEPTH = 5  # how deep containers and objects are followed, from a module's own attributes on
_LONGEST = 1000  # items of a container at most, or else they are not looked at
_LARGEST = 2**20  # bytes of a frozen parameter at most, or else it is not kept


class Snapshot:
    """Remembers the contents of containers, tensors, arrays and random generators, and puts them back.

    Of the parameters it keeps the frozen and small ones only: a forward pass may count in them. It looks into objects
    of the user's own classes, and not into those of the standard library and of torch.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._seen: dict[int, Any] = {}  # kept alive, so that no other object gets the same id
        self._left: dict[int, tuple[Tensor, int]] = {}  # parameters that are not kept, and their versions

    def put_back(self) -> None:
        """Bring everything back to what it was; a warning names what cannot be."""
        for undo in self._undo:
            undo()
        changed = [p for p, version in self._left.values() if p._version != version]
        if changed:
            logger.warning(
                "the model's forward pass changes %d parameters itself, such as one of shape %s: FNGD's probe, a pass "
                "without a step, has changed them once more. Let the model change them in training mode only, or "
                "keep them in buffers",
                len(changed),
                tuple(changed[0].shape),
            )

    def take(self, value: Any, depth: int = 0) -> None:
        """Remember what a value holds."""
        if depth > _DEPTH or id(value) in self._seen or isinstance(value, str | bytes | int | float):
            return
        if isinstance(value, nn.Parameter) and (value.requires_grad or value.nbytes > _LARGEST):
            if not value.is_inference():
                self._left[id(value)] = value, value._version
            return
        self._seen[id(value)] = value
        kind = type(value)
        if isinstance(value, Tensor):
            self._take_tensor(value)
        elif kind in _DICTS:
            entries = dict(value)
            self._undo.append(lambda: (value.clear(), value.update(entries)))
            self._take_all(entries.values(), depth)
        elif kind in (list, deque):
            items = list(value)
            self._undo.append(lambda: (value.clear(), value.extend(items)))
            self._take_all(items, depth)
        elif kind is set:
            members = set(value)
            self._undo.append(lambda: (value.clear(), value.update(members)))
        elif kind is tuple:
            self._take_all(value, depth)
        elif isinstance(value, torch.Generator):
            drawn = value.get_state()
            self._undo.append(lambda: value.set_state(drawn))
        elif isinstance(value, random.Random):
            state = value.getstate()
            self._undo.append(lambda: value.setstate(state))
        elif not self._take_array(value) and _is_the_users(value):
            self.take(vars(value), depth + 1)

    def _take_all(self, values: Any, depth: int) -> None:
        if len(values) <= _LONGEST:
            for value in values:
                self.take(value, depth + 1)

    def _take_tensor(self, value: Tensor) -> None:
        if value.is_inference() or value.is_meta:
            return
        version, kept = value._version, value.detach().clone()

        def undo() -> None:
            # Batch norms change their statistics without a new version.
            same = value._version == version and (value.layout != torch.strided or torch.equal(value, kept))
            if not same:
                with torch.no_grad():
                    value.copy_(kept)

        self._undo.append(undo)

    def _take_array(self, value: Any) -> bool:
        """Take an array or a random generator of numpy; returns whether ``value`` was one."""
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return False
        if isinstance(value, numpy.ndarray):
            if value.flags.writeable:
                kept = value.copy()
                self._undo.append(lambda: value.__setitem__(..., kept))
        elif isinstance(value, numpy.random.Generator):
            drawn = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", drawn))
        elif isinstance(value, numpy.random.RandomState):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        else:
            return False
        return True


def _is_the_users(value: Any) -> bool:
    """Whether it is a module, or an object with attributes whose class is not of torch or of the standard library."""
    if isinstance(value, type) or type(getattr(value, "__dict__", None)) is not dict:
        return False
    library = type(value).__module__.partition(".")[0]
    return isinstance(value, nn.Module) or library not in ("torch", "hf_fngd", *sys.stdlib_module_names)


@contextlib.contextmanager
def untouched(model: nn.Module, training: bool = False, own: Any = None) -> Iterator[None]:
    """Let a model run without gradients, in eval mode unless ``training``; then undo all that it changed.

    ``own`` is its forward, which may be an object with a state of its own.
    """
    snapshot, modules = Snapshot(), list(model.modules())
    snapshot.take(own)
    for module in modules:
        snapshot.take(vars(module))
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    fast, cached = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)  # or else the training pass would reuse casts that have no graph
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path calls no Linear
        for module in modules:
            module.training = module.training and training
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if not _belongs(hook)]:
                    del hooks[key]
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_autocast_cache_enabled(cached)
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        if mps is not None:
            torch.mps.set_rng_state(mps)
        snapshot.put_back()


def _belongs(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.split(".")[0] in _LIBRARIES
