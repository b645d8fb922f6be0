"""What FNGD refuses, when, and what the message offers instead."""

import copy
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from hf_fngd import FNGD, FNGDPreconditioner
from tests.nets import data, loss, net
from tests.steps import assert_equal, with_engine, with_fngd

# What Accelerate's state says of a mode, and what the refusal says: the mode, and a way out.
STATES: dict[str, tuple[dict[str, Any], str]] = {
    "DeepSpeed": ({"distributed_type": DistributedType.DEEPSPEED}, r"under DeepSpeed, .* use FSDP2 .* FNGDFactory"),
    "Megatron-LM": ({"distributed_type": DistributedType.MEGATRON_LM}, r"under Megatron-LM, .* use FSDP2"),
    "FSDP1": ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, r"FSDP version 1, .* use version 2"),
    "tensor": ({"parallelism_config": ParallelismConfig(tp_size=2)}, r"tensor parallelism, .* use accelerate launch"),
    "context": ({"parallelism_config": ParallelismConfig(cp_size=2)}, r"context parallelism, .* use accelerate launch"),
    "sequence": ({"parallelism_config": ParallelismConfig(sp_size=2)}, r"sequence parallelism, .* accelerate launch"),
}


@pytest.fixture
def state() -> Iterator[dict[str, Any]]:
    """Accelerate's state, to write a mode into."""
    with mock.patch.dict(AcceleratorState._shared_state) as shared:
        yield shared


@pytest.mark.parametrize(("values", "message"), STATES.values(), ids=STATES)
def test_a_mode_is_refused_at_construction(values: dict[str, Any], message: str, state: dict[str, Any]) -> None:
    state.update(values)
    model = net()
    with pytest.raises(RuntimeError, match=message):
        FNGD(model)
    assert type(model.fc1) is nn.Linear
    assert not [name for name in model.__dict__ if name.startswith("_fngd")]


@pytest.mark.parametrize(("values", "message"), STATES.values(), ids=STATES)
def test_a_mode_that_comes_later_is_refused_by_the_first_forward_pass(
    values: dict[str, Any], message: str, state: dict[str, Any]
) -> None:
    model, optimizer = with_fngd()
    state.update(values)
    with pytest.raises(RuntimeError, match=message):
        loss(model, *data(6, 3)).backward()
    assert_equal(model, net())
    assert not optimizer.state


def test_supported_modes_are_not_refused(state: dict[str, Any]) -> None:
    state.update(
        distributed_type=DistributedType.FSDP,
        fsdp_plugin=SimpleNamespace(fsdp_version=2),
        parallelism_config=ParallelismConfig(dp_shard_size=2),
    )
    FNGD(net())


def test_data_parallel_is_refused() -> None:
    message = r"nn.DataParallel, .* use accelerate launch with DistributedDataParallel"
    with pytest.raises(RuntimeError, match=message):
        FNGDPreconditioner(nn.Sequential(nn.DataParallel(net())))
    model, _kept = with_engine()
    replica = model._replicate_for_data_parallel()  # what DataParallel runs on each device
    with pytest.raises(RuntimeError, match=message):
        replica(data(6, 3)[0])


class FullyShardedDataParallel(nn.Sequential):
    """The real one wants an accelerator."""


def test_fsdp1_wrappers_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"FSDP version 1, .* use version 2"):
        FNGDPreconditioner(FullyShardedDataParallel(net()))


def test_a_model_loaded_in_parts_is_refused() -> None:
    model = net()
    model._tp_size = 2  # what transformers' from_pretrained(tp_plan=...) leaves
    with pytest.raises(RuntimeError, match=r"tensor parallelism"):
        FNGDPreconditioner(model)


@pytest.mark.parametrize("build", [FNGD, FNGDPreconditioner])
@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies_are_refused(build: Callable[[nn.Module], Any], clone: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="belongs to one model"):
        clone(build(net()))


def test_a_sparse_gradient_is_refused_by_the_first_step() -> None:
    model = nn.Sequential(nn.Embedding(10, 5, sparse=True), nn.Linear(5, 3))
    optimizer = FNGD(model)
    model(torch.arange(8).view(4, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="no sparse gradients"):
        optimizer.step()
