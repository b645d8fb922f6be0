"""FNGDCallback: tells the optimizer about epochs and Trainer's logs about the optimizer."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fngd.optimizer import FNGD


class FNGDCallback(TrainerCallback):  # type: ignore[misc]
    """Adds ``fngd_phase``, ``fngd_lambda``, ``fngd_rho``, ``fngd_weight_spread`` and ``fngd_skipped`` to the logs.

    There are no lambda and no rho where nothing asks for them, as by default; ``refresh=50`` measures rho all the same.

    FNGD trains rightly without it. What it adds to the phases: the end of an epoch is known even where
    Accelerate does not show it (iterable datasets under gradient accumulation). ``fngd_phase`` is 0 in the first
    phase and 1 from its last step on, which ends it; ``fngd_skipped`` counts the steps skipped so far, by FNGD or by a
    loss scaler. The coverage report is printed once, after the first step.

    Args:
        suspects: a CSV file to write `hf_fngd.FNGD.suspects` to at the end of training, by the main process; a relative
            path is one inside ``args.output_dir``. None for none. Needs ``sharing="index"``.

    Raises:
        ValueError: at the start of training, where the optimizer is not FNGD, or ``suspects`` is given and the sharing
            policy is another.
    """

    def __init__(self, suspects: str | PathLike[str] | None = None) -> None:
        self._suspects = suspects
        self._values: dict[str, float] = {}
        self._told = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the optimizer."""
        optimizer = _fngd(kwargs["optimizer"])
        if self._suspects is not None:
            optimizer.suspects()  # refused now, not when training is over

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the suspects."""
        if self._suspects is not None and state.is_world_process_zero:
            _fngd(kwargs["optimizer"]).suspects().to_csv(Path(args.output_dir) / self._suspects)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the first-epoch phase."""
        _fngd(kwargs["optimizer"]).end_epoch()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure while the gradients still exist, in the steps that Trainer logs."""
        optimizer = _fngd(kwargs["optimizer"])
        if not self._told and state.is_world_process_zero:
            tqdm.write(str(optimizer.coverage()))  # print() would break the progress bar
            self._told = True
        if getattr(kwargs["optimizer"], "step_was_skipped", False):  # by the loss scaler, past FNGD's own step
            optimizer.skipped += 1
        step = state.global_step + 1
        if args.logging_strategy == "epoch":
            due = optimizer.preconditioner.epoch_ended
        else:
            due = step % max(1, state.logging_steps) == 0
        if due or step in (1, state.max_steps):
            self._values = {f"fngd_{name}": value for name, value in optimizer.diagnostics().items()}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to training logs, and to the history that Trainer saves."""
        if logs is not None and "loss" in logs and self._values:
            logs.update(self._values)
            if state.log_history:
                state.log_history[-1].update(self._values)


def _fngd(optimizer: Any) -> FNGD:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    if not isinstance(optimizer, FNGD):
        raise ValueError(
            f"FNGDCallback needs FNGD as the optimizer, found {type(optimizer).__name__}: pass "
            "optimizers=(FNGD(model), scheduler) to Trainer, or remove the callback"
        )
    return optimizer
