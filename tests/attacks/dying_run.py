"""A small training run under Trainer that can be told where to die; every process that calls it is expendable."""

from __future__ import annotations

import io
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
import transformers.trainer_utils
from safetensors.torch import save
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from hf_fngd import FNGD, FNGDCallback
from hf_fngd.weights.replay import ReplaySharing
from tests.modes.harness import arguments
from tests.modes.nets import bert, gpt2

SAVED_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
LENGTH = 6


@dataclass(frozen=True)
class Death:
    """Where to die: at the event ``kind`` of an optimizer step.

    Attributes:
        kind: the event's name; "time" is none, the parent kills.
        step: number of the optimizer step, from 1.
        micro: for events in backward: which of the step's backward passes, from 0.
        share: how much of a file is written, or how long to wait.
    """

    kind: str
    step: int = 0
    micro: int = 0
    share: float = 0.5


class Events(TrainerCallback):
    """Records which events happen in which step, and dies in the one that was named."""

    def __init__(self, optimizer: FNGD, death: Death | None) -> None:
        self.optimizer, self.death = optimizer, death
        self.seen: list[tuple[str, int, int]] = []
        self.step, self.micro = 1, 0
        self.switched = False

    def happens(self, kind: str, step: int, micro: int = 0) -> bool:
        """Note an event; whether it is the one to die in."""
        self.seen.append((kind, step, micro))
        return self.death is not None and (kind, step, micro) == (self.death.kind, self.death.step, self.death.micro)

    def die_if(self, now: bool) -> None:
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self.micro = state.global_step + 1, 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.micro += 1

    def in_backward(self, _: torch.Tensor) -> None:
        """Some layers have their gradients, others do not yet."""
        self.die_if(self.happens("backward", self.step, self.micro))

    @property
    def shared(self) -> bool:
        """Whether the next step is a shared one."""
        policy = self.optimizer.preconditioner.policy
        return isinstance(policy, ReplaySharing) and not policy.computes

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.shared and not self.switched:
            self.switched = True
            self.die_if(self.happens("switch", state.global_step + 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.die_if(self.happens("later" if self.shared else "first-epoch", state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.die_if(self.happens("saved", state.global_step))

    # Files cut off ---------------------------------------------------------------------------------------

    def watch_files(self) -> None:
        """Replace what Trainer writes checkpoints with, for the rest of this process."""
        save_archive, save_state, remove = (
            torch.save,
            TrainerState.save_to_json,
            transformers.trainer_utils.shutil.rmtree,
        )

        def archive(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            buffer = io.BytesIO()
            save_archive(value, buffer, *args, **kwargs)
            self._write(file, buffer.getvalue())

        def tensors(values: dict[str, torch.Tensor], file: Any, metadata: Any = None) -> None:
            self._write(file, save(values, metadata=metadata))

        def state_json(state: TrainerState, file: str) -> None:
            save_state(state, file)
            self._write(file, Path(file).read_bytes())

        def rmtree(folder: Any, *args: Any, **kwargs: Any) -> None:
            if self.happens("deleting", self._saved_step()):
                files = sorted(Path(folder).iterdir())
                for file in files[: 1 + int(self.share() * (len(files) - 1))]:
                    file.unlink()
                self.die_if(True)
            remove(folder, *args, **kwargs)

        torch.save = archive
        transformers.modeling_utils.safe_save_file = tensors
        TrainerState.save_to_json = state_json
        transformers.trainer_utils.shutil.rmtree = rmtree

    def share(self) -> float:
        assert self.death is not None
        return self.death.share

    def _saved_step(self) -> int:
        return max(step for kind, step, _ in self.seen if kind == "trainer_state.json")

    def _write(self, file: Any, data: bytes) -> None:
        folder, _, step = Path(file).parent.name.partition("-")
        if folder == "checkpoint" and self.happens(Path(file).name, int(step)):
            Path(file).write_bytes(data[: int(self.share() * len(data))])
            self.die_if(True)
        Path(file).write_bytes(data)


def build_model(kind: str, dropout: float) -> nn.Module:
    if kind == "bert":
        changes = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
        return bert(num_hidden_layers=1, num_labels=2, **changes)
    return gpt2(n_layer=1, **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout))


def rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 24, (settings["samples"], LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": row if settings["model"] == "gpt2" else int(row[0] > 12)} for row in ids]


def train(settings: dict[str, Any], folder: Path, resume: str | None, death: Death | None) -> dict[str, Any]:
    """Train to the end, unless death comes first.

    Returns:
        ``parameters``, ``optimizer`` (its state), ``logs``, and ``events``.
    """
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    model = build_model(settings["model"], settings["dropout"])
    optimizer = FNGD(model, **settings["fngd"])
    events = Events(optimizer, death)
    layers = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    layers[len(layers) // 2].weight.register_post_accumulate_grad_hook(events.in_backward)
    events.watch_files()
    args = arguments(
        folder,
        num_train_epochs=settings["epochs"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=settings["accumulation"],
        save_strategy="steps",
        save_steps=settings["save_steps"],
        save_total_limit=settings["save_total_limit"],
        lr_scheduler_type=settings["scheduler"],
        max_grad_norm=settings["max_grad_norm"],
        logging_strategy="steps",
        logging_steps=1,
        seed=settings["trainer_seed"],
    )
    callbacks: list[TrainerCallback] = [events, *([FNGDCallback()] if settings["callback"] else [])]
    trainer = Trainer(
        model=model, args=args, train_dataset=rows(settings), optimizers=(optimizer, None), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "parameters": {name: value.detach() for name, value in model.named_parameters()},
        "optimizer": optimizer.state_dict(),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "events": events.seen,
    }


Spoil = Callable[[Path], None]


def _without(key: str, **parts: Any) -> Spoil:
    """Set parts of the policy's state to those of a new optimizer."""

    def spoil(checkpoint: Path) -> None:
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        policy = state["param_groups"][0]["fngd"]["engine"]["policy"]
        policy.update({name: value for name, value in ({key: None} | parts).items() if name in policy})
        torch.save(state, checkpoint / "optimizer.pt")

    return spoil


def _without_moments(checkpoint: Path) -> None:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["state"] = {}
    torch.save(state, checkpoint / "optimizer.pt")


def _without_rng(checkpoint: Path) -> None:
    (checkpoint / "rng_state.pth").unlink()


SPOILS: dict[str, Spoil] = {
    "rows": _without("rows"),
    "first epoch": _without("shared_since", steps=0),
    "place": _without("averages", place=0),
    "moments": _without_moments,
    "rng": _without_rng,
}
"""Ways to damage a checkpoint that still loads: what the comparison has to notice."""
