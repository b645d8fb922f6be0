"""Checkpoints that a kill cut off, file by file, and layouts that are not to be rejected."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_fngd import FNGD, last_complete_checkpoint
from tests.modes.harness import arguments
from tests.modes.nets import LINEAR

ARCHIVES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
CUT = [*ARCHIVES, "model.safetensors", "trainer_state.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of four steps: checkpoint-2 and checkpoint-4."""
    folder, model = tmp_path_factory.mktemp("run"), LINEAR.make()
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
    Trainer(model=model, args=args, train_dataset=LINEAR.data(12), optimizers=(FNGD(model), None)).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: min(int(share * len(data)), len(data) - 1)])


def test_the_newest_of_whole_checkpoints(run: Path) -> None:
    assert last_complete_checkpoint(run) == last_complete_checkpoint(str(run)) == str(run / "checkpoint-4")
    (run / "checkpoint-4").rename(run / "checkpoint-10")  # by number, not by name
    (run / "checkpoint-99").write_text("no folder")
    (run / "checkpoint-98-old").mkdir()
    assert last_complete_checkpoint(run) == str(run / "checkpoint-10")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["empty", "half", "all-but-a-byte"])
@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_off(run: Path, name: str, share: float, caplog: pytest.LogCaptureFixture) -> None:
    if name == "trainer_state.json" and share == 1.0:
        cut(run / "checkpoint-4" / name, 1.0)  # the newline at its end
    cut(run / "checkpoint-4" / name, share)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "checkpoint-4 is not a complete checkpoint" in caplog.text
    assert name in caplog.text
    assert get_last_checkpoint(run) == str(run / "checkpoint-4")  # what makes this function necessary


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_a_file_missing(run: Path, name: str) -> None:
    (run / "checkpoint-4" / name).unlink()
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_where_none_is_complete(run: Path, tmp_path: Path) -> None:
    for folder in run.glob("checkpoint-*"):
        (folder / "trainer_state.json").unlink()
    assert last_complete_checkpoint(run) is None
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert last_complete_checkpoint(run / "checkpoint-4" / "model.safetensors") is None


@pytest.mark.parametrize("content", ["[]", "null", "[" * 100_000, "{"], ids=["list", "null", "deep", "open"])
def test_a_state_that_is_no_object(run: Path, content: str) -> None:
    (run / "checkpoint-4" / "trainer_state.json").write_text(content)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


@pytest.mark.parametrize(
    "header",
    [b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x07" + bytes(7) + b'{"a":1}', b"\x0a" + bytes(7) + b'{"a": {}} '],
    ids=["huge", "list", "number", "no-offsets"],
)
def test_a_safetensors_header_that_cannot_be_read(run: Path, header: bytes) -> None:
    (run / "checkpoint-4" / "model.safetensors").write_bytes(header)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


# What must not be rejected


def shard(folder: Path, suffix: str = "safetensors") -> None:
    weights = (folder / "model.safetensors").rename(folder / f"model-00001-of-00001.{suffix}")
    index = {"metadata": {}, "weight_map": {"a": weights.name, "b": weights.name}}
    (folder / f"model.{suffix}.index.json").write_text(json.dumps(index))


def in_the_old_format(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def weights_only(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()


def fully_sharded(folder: Path) -> None:
    for part, file in (("pytorch_model_fsdp_0", "model.safetensors"), ("optimizer_0", "optimizer.pt")):
        (folder / part).mkdir()
        (folder / file).rename(folder / part / "__0_0.distcp")


def adapters(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def files_of_the_user(folder: Path) -> None:
    (folder / "notes.json").write_text("half a")
    (folder / "data.pkl").write_bytes(b"PK")
    (folder / "samples.npz").write_bytes(b"")


@pytest.mark.parametrize(
    "change",
    [shard, in_the_old_format, weights_only, fully_sharded, adapters, files_of_the_user],
    ids=lambda f: f.__name__,
)
def test_other_layouts_are_taken_as_they_are(run: Path, change: object) -> None:
    assert callable(change)
    change(run / "checkpoint-4")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-4")


def test_a_shard_missing(run: Path) -> None:
    shard(run / "checkpoint-4")
    (run / "checkpoint-4" / "model-00001-of-00001.safetensors").rename(run / "checkpoint-4" / "other.safetensors")
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")


def test_a_folder_that_cannot_be_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path.read_text

    def refuse(self: Path, *args: object, **kwargs: object) -> str:
        if self.parent.name == "checkpoint-4":
            raise PermissionError(13, "Permission denied", str(self))
        return own(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", refuse)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
