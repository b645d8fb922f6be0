"""Find the newest checkpoint that a run can resume from: a run that is killed while it saves leaves half of one."""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"checkpoint-(\d+)")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin")


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest of `complete_checkpoints`, or None."""
    return next(complete_checkpoints(output_dir), None)


def complete_checkpoints(output_dir: str | os.PathLike[str]) -> Iterator[str]:
    """The checkpoints of a Trainer's output folder whose files are all whole, the newest first.

    Trainer writes ``trainer_state.json`` last, so a run that is killed while it saves leaves a folder that
    `transformers.trainer_utils.get_last_checkpoint` returns nevertheless. Here a folder counts if that file can be
    read, weights are there (and shards that an index lists), the optimizer's state is there where the scheduler's is,
    and no safetensors file or torch archive is cut off. What is not known, such as the folders of sharded checkpoints,
    is taken as it is. Only headers are read, never whole tensors. A log warning names each folder that is passed over.
    """
    root = Path(output_dir)
    steps = {f: match for f in root.iterdir() if (match := _FOLDER.fullmatch(f.name))} if root.is_dir() else {}
    for folder in sorted(steps, key=lambda folder: int(steps[folder][1]), reverse=True):
        try:
            if folder.is_dir():
                _check(folder)
                yield str(folder)
        except (OSError, ValueError) as error:
            logger.warning("%s is not a complete checkpoint: %s", folder, error)


def _check(folder: Path) -> None:
    """Raise OSError or ValueError where a run cannot resume from a checkpoint."""
    _object(folder / "trainer_state.json")
    entries = sorted(folder.iterdir())
    names = [entry.name for entry in entries]
    if not any(entry.is_dir() for entry in entries):  # otherwise sharded, in a layout that is not Trainer's own
        # What a kill amid the deletion of an old checkpoint leaves behind. Trainer resumes without the optimizer's
        # state, and says nothing, where either of the two files is missing.
        if not any(name.endswith((".safetensors", ".bin")) and name not in _NOT_WEIGHTS for name in names):
            raise ValueError("there are no weights")
        if any("optimizer" in name for name in names) != ("scheduler.pt" in names):
            raise ValueError("of the states of the optimizer and the scheduler one is missing")
    for file in filter(Path.is_file, entries):
        if file.name.endswith((".safetensors.index.json", ".bin.index.json")):
            shards = _object(file).get("weight_map")
            for shard in shards.values() if isinstance(shards, dict) else ():
                if not (folder / str(shard)).is_file():
                    raise ValueError(f"{shard}, which {file.name} lists, is missing")
        elif file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):  # reads the header, and compares it with the file's size
                    pass
            except SafetensorError as error:
                raise ValueError(f"{file.name} is cut off: {error}") from error
        elif file.suffix in (".pt", ".pth", ".bin"):
            with file.open("rb") as stream:
                start = stream.read(2)
            # A zip archive has its directory at its end. Older versions of torch wrote another format: not known here.
            if not start or (start == b"PK" and not zipfile.is_zipfile(file)):
                raise ValueError(f"{file.name} is cut off")


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return value
