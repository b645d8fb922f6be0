"""Which checkpoint a run goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import TrainingArguments

from hf_fngd import last_complete_checkpoint


def find_checkpoint(args: TrainingArguments, overwrite: bool) -> str | None:
    """Return the checkpoint to resume from: the one that was named, or the last complete one in the output folder.

    Args:
        args: `output_dir` and `resume_from_checkpoint`: a folder, or "true" for the last one in `output_dir`, which
            must exist then and be complete.
        overwrite: Delete the folder's checkpoints, so that none is resumed, now or after an interruption.

    Raises:
        ValueError: A checkpoint was asked for and there is none.
    """
    named, output_dir = args.resume_from_checkpoint, Path(args.output_dir)
    if named is not None and named.lower() != "true":
        if not Path(named).is_dir():
            raise ValueError(f"resume_from_checkpoint {named!r} is no folder.")
        return named
    with args.main_process_first(local=False, desc="looking for checkpoints"):
        if overwrite and args.process_index == 0:
            for folder in output_dir.glob("checkpoint-*"):
                shutil.rmtree(folder)
        last = last_complete_checkpoint(output_dir)
    if last is None and named is not None:
        raise ValueError(f"{output_dir} holds no complete checkpoint to resume from.")
    return last
