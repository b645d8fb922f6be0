"""The configurations for `accelerate launch` are what Accelerate reads."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "ddp_two_cpu_processes": "MULTI_GPU", "fsdp2": "FSDP"}


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type.name == KINDS[name]
    assert config.num_processes > 1
    assert not config.use_cpu
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2  # the first is refused
