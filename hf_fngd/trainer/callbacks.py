"""FNGDCallback: tells the optimizer about epochs, and logs, checkpoints and the model card about the optimizer."""

import logging
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from hf_fngd.config import ignored_in
from hf_fngd.stack import callers
from hf_fngd.trainer.card import keep_true, save_settings
from hf_fngd.trainer.refusals import calling_trainer, check_column, check_loss
from hf_fngd.trainer.unwrapped import unwrap

logger = logging.getLogger(__name__)


class FNGDCallback(TrainerCallback):  # type: ignore[misc]
    """Adds `hf_fngd.FNGD.diagnostics` to the logs, and prints the coverage report after the first step.

    The names begin with ``fngd_``. ``fngd_skipped`` counts the steps skipped so far, by FNGD or by a loss scaler;
    ``fngd_phase`` is 1 from the last step of the first epoch on. Each checkpoint gets the settings as a file. So does
    the output folder with the model card of ``create_model_card`` and ``push_to_hub``, which names them.

    FNGD trains correctly without it. With it FNGD learns of the end of an epoch even where Accelerate does not show it
    (iterable datasets under gradient accumulation). At the start of training it raises TypeError if the optimizer is
    not FNGD, and ValueError if the loss has parameters that FNGD does not train, or the trainer drops the dataset's
    column ``sample_ids``. It warns of settings in TrainingArguments that FNGD was built without.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._values: dict[str, float] = {}
        self._step = 0  # the step in which the values were measured
        self._always = False  # measure in every step, since a log came in a step that could not be foreseen
        self._told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = unwrap(kwargs["optimizer"])
        self._begin()
        if not optimizer.built_from_args and (ignored := ignored_in(args, optimizer.settings, {})):
            logger.warning(
                "%s of TrainingArguments has no effect, since FNGD(model, ...) did not see them: give them to FNGD, or "
                "build it by FNGD.from_training_args(model, args)",
                ", ".join(f"{name}={value!r}" for name, value in ignored.items()),
            )
        # Trainer puts callbacks of users behind those that report to TensorBoard and others, which then do not see what
        # this one adds to the logs. The handler is not handed on. A new list: a loop over the old one is under way.
        handler = next(callers()).f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
        trainer = calling_trainer()
        if handler is not None and getattr(trainer, "callback_handler", None) is handler:
            keep_true(trainer)
            check_loss(optimizer.preconditioner.model, trainer)
            check_column(trainer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unwrap(kwargs["optimizer"]).end_epoch()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure while the gradients still exist, in the steps that Trainer logs."""
        optimizer = unwrap(kwargs["optimizer"])
        if not self._told and state.is_world_process_zero:
            tqdm.write(str(optimizer.coverage()))  # print() would break the progress bar
            self._told = True
        if getattr(kwargs["optimizer"], "step_was_skipped", False):  # by the loss scaler, past FNGD's own step
            optimizer.skipped += 1
        step = state.global_step + 1
        by_epoch = args.logging_strategy == "epoch"
        due = optimizer.preconditioner.epoch_ended if by_epoch else step % max(1, state.logging_steps) == 0
        if due or self._always or step in (1, state.max_steps):
            self._step = step
            self._values = {f"fngd_{name}": value for name, value in optimizer.diagnostics().items()}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the values to training logs, and to the history that Trainer saves."""
        if logs is not None and "loss" in logs:
            if self._step != state.global_step:  # of another step only what was counted there is true here
                self._always = True
                self._values = {"fngd_skipped": float(unwrap(kwargs["optimizer"]).skipped)}
            logs.update(self._values)
            if state.log_history:
                state.log_history[-1].update(self._values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put ``fngd_config.json`` into the checkpoint."""
        optimizer, folder = unwrap(kwargs["optimizer"]), Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_settings(optimizer, folder)
