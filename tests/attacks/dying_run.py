"""A small training run under Trainer that dies by SIGKILL where it is told to, is resumed, and is compared.

    python -m tests.attacks.dying_run NAME... FOLDER

prints, of each run that `RUNS` names, what differs from the same run that nobody killed, as JSON. In a process of its
own, since it forks and may have no other threads.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers.modeling_utils
import transformers.trainer_utils
from safetensors.torch import save
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState

from hf_fngd import FNGD, FNGDCallback, last_complete_checkpoint
from tests.modes.harness import arguments
from tests.modes.nets import CONV1D, LINEAR
from tests.nets import settings_of
from tests.steps import digest


@dataclass(frozen=True)
class Death:
    """Where to die.

    Attributes:
        kind: an event: a file that is being written, "backward", "deleting" an old checkpoint, "switch" to shared
            steps, "step" that is done, "saved".
        number: which of the events of this kind, from 0.
        share: how much of a file is written, or of a folder deleted.
    """

    kind: str
    number: int = 0
    share: float = 0.5


@dataclass(frozen=True)
class Run:
    """The settings of a run, its deaths one after the other, and what is damaged in the checkpoint it resumes from."""

    fngd: dict[str, Any]
    deaths: tuple[Death, ...]
    gpt2: bool = False
    trainer: tuple[tuple[str, Any], ...] = ()
    spoil: str | None = None


REPLAY = settings_of("replay", coefficient_steps=4, damping=0.05)
RUNS = {
    "a file": Run(settings_of("clipped"), (Death("optimizer.pt", 2),), True),
    "two files": Run(
        settings_of("clipped") | {"update": "adam"},
        (Death("model.safetensors", 1, 0.9), Death("trainer_state.json", 0, 0.2)),
        trainer=(("gradient_accumulation_steps", 2), ("save_steps", 2)),
    ),
    "backward": Run(settings_of("uniform"), (Death("backward", 4),), trainer=(("gradient_accumulation_steps", 2),)),
    "switch": Run(REPLAY | {"update": "momentum"}, (Death("switch"),)),
    "a shared step": Run(REPLAY | {"fallback": "sgd"}, (Death("step", 4),), True, (("save_steps", 2),)),
    "deleting": Run(settings_of("never"), (Death("deleting", 1),), trainer=(("save_total_limit", 1),)),
    "saved": Run(REPLAY | {"coefficient_steps": None}, (Death("saved", 1), Death("backward", 1))),
} | {
    # The later steps of a run depend on replayed sample weights, on rho, on moments and dropout.
    f"without {part}": Run(REPLAY | {"update": "momentum"}, (Death("step", 4),), spoil=part)
    for part in ("rows", "averages", "moments", "rng")
}


class Events(TrainerCallback):
    """Counts what happens, and dies in what was named."""

    def __init__(self, optimizer: FNGD, death: Death | None) -> None:
        self.optimizer, self.death = optimizer, death
        self.seen: Counter[str] = Counter()

    def happens(self, kind: str) -> bool:
        """Note an event; whether it is the one to die in."""
        self.seen[kind] += 1
        return self.death is not None and (kind, self.seen[kind] - 1) == (self.death.kind, self.death.number)

    def die_if(self, now: bool) -> None:
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    def in_backward(self, _: torch.Tensor) -> None:
        """Some layers have their gradients, others do not yet."""
        self.die_if(self.happens("backward"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        policy = self.optimizer.preconditioner.policy
        if getattr(policy, "shared_since", None) == getattr(policy, "steps", 0):
            self.die_if(self.happens("switch"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.die_if(self.happens("step"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.die_if(self.happens("saved"))

    def watch_files(self) -> None:
        """Replace what Trainer writes checkpoints with, for the rest of this process."""
        save_archive, save_state = torch.save, TrainerState.save_to_json
        remove = transformers.trainer_utils.shutil.rmtree

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
            if self.happens("deleting"):
                files = sorted(Path(folder).iterdir())
                for file in files[: 1 + int(self.death.share * (len(files) - 1))]:
                    file.unlink()
                self.die_if(True)
            remove(folder, *args, **kwargs)

        torch.save = archive
        transformers.modeling_utils.safe_save_file = tensors
        TrainerState.save_to_json = state_json
        transformers.trainer_utils.shutil.rmtree = rmtree

    def _write(self, file: Any, data: bytes) -> None:
        now = Path(file).parent.name.startswith("checkpoint") and self.happens(Path(file).name)
        Path(file).write_bytes(data[: int(self.death.share * len(data))] if now else data)
        self.die_if(now)


def train(run: Run, folder: Path, resume: str | None, death: Death | None) -> dict[str, Any]:
    """Train to the end, unless death comes first; the parameters, the optimizer's state and the logs."""
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    kind = CONV1D if run.gpt2 else LINEAR
    dropout = ("resid_pdrop", "embd_pdrop") if run.gpt2 else ("hidden_dropout_prob", "attention_probs_dropout_prob")
    model = kind.make(**dict.fromkeys(dropout, 0.3))
    optimizer = FNGD(model, lr=1e-2, weight_decay=0.1, **run.fngd)
    events = Events(optimizer, death)
    layers = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    layers[len(layers) // 2].weight.register_post_accumulate_grad_hook(events.in_backward)
    events.watch_files()
    values = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps"}
    args = arguments(folder, **(values | {"logging_steps": 1, "lr_scheduler_type": "cosine"} | dict(run.trainer)))
    callbacks = [events, FNGDCallback()]
    trainer = Trainer(model, args, train_dataset=kind.data(12), optimizers=(optimizer, None), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "parameters": {name: value.detach() for name, value in model.named_parameters()},
        "optimizer": optimizer.state_dict(),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def spoil(part: str, checkpoint: Path) -> None:
    """Damage a checkpoint that still loads."""
    if part == "rng":
        (checkpoint / "rng_state.pth").unlink()
        return
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    if part == "moments":
        state["state"] = {}
    else:
        state["param_groups"][0]["fngd"]["engine"]["policy"][part] = None
    torch.save(state, checkpoint / "optimizer.pt")


def in_child(run: Run, folder: Path, resume: str | None, death: Death | None) -> None:
    """Train in a process of its own, which writes ``result.pt`` unless it dies as it was told.

    Raises:
        RuntimeError: it did otherwise; the message ends in its output.
    """
    log = folder / "log.txt"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            try:
                own = torch.save
                own(train(run, folder / "run", resume, death), folder / "result.pt")
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if killed != (death is not None) or (not killed and status != 0):
        raise RuntimeError(f"the run ended with status {status}:\n{log.read_text()[-4000:]}")


Report = dict[str, Any]


def attack(run: Run, root: Path, whole: Path) -> Report:
    """Die and resume; from which steps, past how many cut off checkpoints, and what is not the same in the end."""
    root.mkdir()
    resume, resumed, passed_over = None, [], 0
    for death in run.deaths:
        in_child(run, root, resume, death)
        resume = last_complete_checkpoint(root / "run")
        resumed.append(None if resume is None else int(resume.rpartition("-")[2]))
        newest = max((int(path.name[11:]) for path in (root / "run").glob("checkpoint-*")), default=None)
        passed_over += newest != resumed[-1]
    if run.spoil is not None and resume is not None:
        spoil(run.spoil, Path(resume))
    in_child(run, root, resume, None)
    found, expected = (torch.load(folder / "result.pt", weights_only=True) for folder in (root, whole))
    differs = [part for part in expected if digest(found[part]) != digest(expected[part])]
    return {"resumed": resumed, "passed over": passed_over, "differs": differs}


def main(names: list[str], folder: Path) -> dict[str, Report]:
    torch.set_num_threads(1)
    found, wholes = {}, dict[str, Path]()
    for number, name in enumerate(names):
        run = RUNS[name]
        key = repr((run.fngd, run.gpt2, run.trainer))
        if key not in wholes:
            wholes[key] = folder / f"whole-{number}"
            wholes[key].mkdir()
            in_child(run, wholes[key], None, None)
        found[name] = attack(run, folder / f"killed-{number}", wholes[key])
        shutil.rmtree(folder / f"killed-{number}")
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:-1], Path(sys.argv[-1]))))
