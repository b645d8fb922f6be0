"""The newest checkpoint that a run can resume from: one killed while it saves leaves half a checkpoint behind."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"checkpoint-(\d+)")
_STATE_NAME = "trainer_state.json"
_ARCHIVES = (".pt", ".pth", ".bin")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin")


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint of a Trainer's output folder whose files are all whole.

    Trainer writes ``checkpoint-N`` in place and ``trainer_state.json`` last, so a run that is killed while it saves
    leaves a folder that `transformers.trainer_utils.get_last_checkpoint` returns nevertheless. Here a folder counts if
    ``trainer_state.json`` can be read, weights are there (and shards that an index lists), the optimizer's state is
    there where the scheduler's is, and no safetensors file or torch archive is cut off. What is not known, such as the
    folders of sharded and DeepSpeed checkpoints, is taken as it is. Only headers are read, never whole tensors.

    Args:
        output_dir: Trainer's ``output_dir``; it need not exist.

    Returns:
        The folder's path, for ``trainer.train(resume_from_checkpoint=...)``; None where no checkpoint is complete.
        A folder that is passed over is named in a log warning.
    """
    root = Path(output_dir)
    if not root.is_dir():
        return None
    steps = {folder: match for folder in root.iterdir() if (match := _FOLDER.fullmatch(folder.name))}
    for folder in sorted(steps, key=lambda folder: int(steps[folder][1]), reverse=True):
        if not folder.is_dir():
            continue
        fault = _fault(folder)
        if fault is None:
            return str(folder)
        logger.warning("%s is not a complete checkpoint: %s", folder, fault)
    return None


def _fault(folder: Path) -> str | None:
    """Why a run cannot resume from a checkpoint; None where nothing speaks against it."""
    try:
        _object(folder / _STATE_NAME)
        entries = sorted(folder.iterdir())
        _check_parts(entries)
        for entry in entries:
            if entry.is_file():
                _check_file(entry)
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror or error}"
    except _CutOffError as error:
        return str(error)
    return None


class _CutOffError(Exception):
    """A file is not whole, or not there."""


def _check_parts(entries: list[Path]) -> None:
    # What a kill amid the deletion of an old checkpoint leaves behind. Trainer resumes without the optimizer's
    # state, and says nothing, where either of the two files is missing.
    if any(entry.is_dir() for entry in entries):
        return  # sharded, in a layout that is not Trainer's own
    names = [entry.name for entry in entries]
    if not any(name.endswith((".safetensors", ".bin")) and name not in _NOT_WEIGHTS for name in names):
        raise _CutOffError("there are no weights")
    optimizer, scheduler = any("optimizer" in name for name in names), "scheduler.pt" in names
    if optimizer != scheduler:
        raise _CutOffError(f"there is no state of the {'scheduler' if optimizer else 'optimizer'}")


def _check_file(file: Path) -> None:
    if file.name.endswith((".safetensors.index.json", ".bin.index.json")):
        shards = _object(file).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else ():
            if isinstance(shard, str) and not (file.parent / shard).is_file():
                raise _CutOffError(f"{shard}, which {file.name} lists, is missing")
    elif file.suffix == ".safetensors":
        _check_safetensors(file)
    elif file.suffix in _ARCHIVES:
        _check_archive(file)


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _CutOffError(f"{file.name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise _CutOffError(f"{file.name} holds no JSON object")
    return value


def _check_safetensors(file: Path) -> None:
    # Eight bytes with the length of a JSON header, the header, then the tensors at the offsets that it lists.
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 8 + length <= size else b""
    try:
        tensors = json.loads(header)
        end = max((tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _CutOffError(f"the header of {file.name} cannot be read") from error
    if size != 8 + length + end:
        raise _CutOffError(f"{file.name} has {size} bytes, its header says {8 + length + end}")


def _check_archive(file: Path) -> None:
    # The directory of a zip archive is at its end. Older versions of torch wrote another format: not known here.
    with file.open("rb") as stream:
        start = stream.read(2)
    if not start or (start == b"PK" and not zipfile.is_zipfile(file)):
        raise _CutOffError(f"{file.name} is cut off")
