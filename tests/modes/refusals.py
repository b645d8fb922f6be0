"""Modes of several processes that FNGD refuses."""

from pathlib import Path
from typing import Any
from unittest import mock

from accelerate.state import AcceleratorState
from torch import nn

from hf_fngd import FNGD
from tests.distributed.test_environment import STATES
from tests.modes.harness import optimizer_arguments
from tests.modes.nets import Kind
from tests.modes.registry import Run, mode


def refused(values: dict[str, Any]) -> Run:
    def run(kind: Kind, sharing: str, folder: Path) -> float:
        with mock.patch.dict(AcceleratorState._shared_state, values):
            FNGD(kind.make(), **optimizer_arguments(sharing))
        return 0.0

    return run


for name, (values, message) in STATES.items():
    mode(name if name[0].isupper() else f"{name} parallelism", refused=message)(refused(values))


@mode("nn.DataParallel", refused=r"nn.DataParallel, .* use accelerate launch with DistributedDataParallel")
def data_parallel(kind: Kind, sharing: str, folder: Path) -> float:
    FNGD(nn.DataParallel(kind.make()), **optimizer_arguments(sharing))
    return 0.0
