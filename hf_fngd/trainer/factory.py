"""FNGDFactory: for ``Trainer(optimizer_cls_and_kwargs=...)``, where no optimizer object can be passed."""

import warnings
from typing import Any

from torch import nn

from hf_fngd.checks import Misplaced
from hf_fngd.config import ignored_in
from hf_fngd.optimizer import FNGD
from hf_fngd.trainer.refusals import calling_trainer, check_column, check_loss

_CURE = (
    "FNGDFactory is no optimizer: pass optimizer_cls_and_kwargs=(FNGDFactory, {...}) to Trainer, or "
    "optimizers=(FNGD(model), None)"
)


class FNGDFactory:
    """Builds FNGD on the model that Trainer hands over, when it does.

    For hyperparameter search and ``model_init`` (a new model each trial), PEFT and TRL (the model is wrapped inside the
    trainer): ``Trainer(..., optimizer_cls_and_kwargs=(FNGDFactory, {"args": args, "config": config}))``. Where a
    trainer does not take the argument, as TRL's for DPO, KTO, GRPO and RLOO, set the attribute before ``train()``:
    ``trainer.optimizer_cls_and_kwargs = (FNGDFactory, {"args": args, "config": config})``.
    """

    param_groups = step = Misplaced(_CURE)

    def __call__(self, model: nn.Module, *, args: Any = None, config: Any = None, **overrides: Any) -> FNGD:
        """Build it as `FNGD.from_training_args` does, or without ``args`` as `FNGD.from_config`.

        Warns where it is given no ``args``, and the trainer's set a learning rate or the like that nothing then reads.
        Raises ValueError where the trainer's loss has parameters that the model has not, or where the trainer drops the
        dataset's column ``sample_ids``.
        """
        trainer = calling_trainer()
        check_loss(model, trainer)
        check_column(trainer)
        if args is not None:
            return FNGD.from_training_args(model, args, config, **overrides)
        optimizer = FNGD.from_config(model, "default" if config is None else config, **overrides)
        ignored = {} if trainer is None else ignored_in(trainer.args, optimizer.settings, overrides)
        if ignored:
            warnings.warn(
                f"FNGDFactory was given no args, so that {', '.join(f'{k}={v!r}' for k, v in ignored.items())} of "
                'TrainingArguments has no effect: pass (FNGDFactory, {"args": args, ...})',
                stacklevel=2,
            )
        return optimizer
