"""Environments in which FNGD would train wrongly: it refuses them early, and names what to use instead."""

import sys
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_fngd.distributed.sharded import is_sharded
from hf_fngd.stack import callers

_DATA_PARALLEL = "use accelerate launch with DistributedDataParallel (multi_gpu) or FSDP2 instead"
_FSDP1 = (
    "FNGD does not run under FSDP version 1, which flattens the weights of several layers into one parameter: use "
    "version 2 (fsdp_version: 2 in the Accelerate config or fsdp_config, torch's fully_shard)"
)
_TENSOR_PARALLEL = ("tensor parallelism", "a layer's weight")


def refuse_environment(model: nn.Module) -> None:
    """Raise RuntimeError under nn.DataParallel, FSDP1, DeepSpeed, Megatron-LM, tensor, context or sequence parallelism.

    They split samples, weights or the optimizer's step in ways that the sample weights cannot follow.
    """
    for module in model.modules():
        refuse_replica(module)
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError(_FSDP1)
    # Looked up, not imported: a plain PyTorch loop has no use for accelerate.
    accelerate = sys.modules.get("accelerate.state")
    state: dict[str, Any] = {} if accelerate is None else accelerate.AcceleratorState._shared_state
    titles = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
    if title := titles.get(getattr(state.get("distributed_type"), "name", "")):
        raise RuntimeError(
            f"FNGD does not run under {title}, which takes gradients and the optimizer's step into its own hands: "
            "use FSDP2 (fsdp_config with version 2, and FNGDFactory) to shard the model, or DistributedDataParallel"
        )
    if getattr(state.get("fsdp_plugin"), "fsdp_version", 2) == 1:
        raise RuntimeError(_FSDP1)
    parallelism = state.get("parallelism_config")
    for owner, size, split in (
        (model, "_tp_size", _TENSOR_PARALLEL),
        (parallelism, "tp_size", _TENSOR_PARALLEL),
        (parallelism, "cp_size", ("context parallelism", "a sample's positions")),
        (parallelism, "sp_size", ("sequence parallelism", "a sample's positions")),
    ):
        if (getattr(owner, size, None) or 1) > 1:
            raise _split(*split)


def refuse_replica(module: nn.Module) -> None:
    """Raise RuntimeError for nn.DataParallel, and for a module that it copied for one device."""
    if isinstance(module, nn.DataParallel) or getattr(module, "_is_replica", False):
        raise RuntimeError(
            "FNGD does not run under nn.DataParallel, whose replicas each see a part of the batch for one backward "
            f"pass: {_DATA_PARALLEL} (or make one device visible with CUDA_VISIBLE_DEVICES)"
        )


def refuse_split_weight(weight: Tensor) -> None:
    """Raise RuntimeError for a weight that is still a shard in its layer's forward; under FSDP2 it is whole there."""
    if is_sharded(weight):
        raise _split(*_TENSOR_PARALLEL)


def refuse_unfrozen() -> None:
    """Raise RuntimeError if DistributedDataParallel wrapped the running model before layers were unfrozen."""
    for frame in callers():
        wrapper = frame.f_locals.get("self")
        if isinstance(wrapper, DistributedDataParallel):
            named = wrapper.module.named_parameters()
            sizes = [p.nbytes for name, p in named if p.requires_grad and name not in wrapper.parameters_to_ignore]
            known = wrapper._get_ddp_logging_data()  # type: ignore[no-untyped-call]
            if [len(sizes), sum(sizes)] != [known["num_parameter_tensors"], known["total_parameter_size_bytes"]]:
                raise RuntimeError(
                    "layers were unfrozen after DistributedDataParallel was put around the model: it averages the "
                    "gradients of those parameters alone that were trained at that time. Put it around the model "
                    "again after unfreezing, or train them from the start, at first with a learning rate of 0"
                )
            return


def _split(title: str, what: str) -> RuntimeError:
    return RuntimeError(
        f"FNGD does not run under {title}, where no process sees {what} whole: the per-sample gradients would be "
        f"partial; {_DATA_PARALLEL}"
    )
