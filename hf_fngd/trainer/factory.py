"""FNGDFactory: for ``Trainer(optimizer_cls_and_kwargs=...)``, where no optimizer object can be passed."""

from typing import Any

from torch import nn

from hf_fngd.checks import Misplaced
from hf_fngd.optimizer import FNGD
from hf_fngd.trainer.loss import check_loss

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

        Raises ValueError where the trainer's loss has parameters that the model has not.
        """
        check_loss(model)
        if args is not None:
            return FNGD.from_training_args(model, args, config, **overrides)
        return FNGD.from_config(model, "default" if config is None else config, **overrides)
