"""FNGDFactory: for ``Trainer(optimizer_cls_and_kwargs=...)``, where no optimizer object can be passed."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_fngd.config import FNGDConfig
from hf_fngd.optimizer import FNGD


class FNGDFactory:
    """Builds FNGD on the model that Trainer hands over, when it does.

    For hyperparameter search and ``model_init`` (a new model each trial), PEFT and TRL (the model is wrapped
    inside the trainer):

        Trainer(..., optimizer_cls_and_kwargs=(FNGDFactory, {"args": args, "config": config}))
    """

    def __call__(self, model: nn.Module, *, args: Any = None, config: Any = None, **overrides: Any) -> FNGD:
        """Build the optimizer.

        Args:
            model: the model to train.
            args: `TrainingArguments`, whose ``learning_rate`` and ``weight_decay`` are honoured.
            config: an `FNGDConfig`, or the name of one, as `FNGDConfig.load` takes it.
            **overrides: arguments of `FNGD`, which win over both.
        """
        if isinstance(config, str):
            config = FNGDConfig.load(config)
        if args is not None:
            return FNGD.from_training_args(model, args, config, **overrides)
        return FNGD(model, **overrides) if config is None else FNGD.from_config(model, config, **overrides)
