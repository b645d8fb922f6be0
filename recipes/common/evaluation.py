"""Evaluation of whole splits."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer


class WholeEvaluation(Trainer):
    """A Trainer that evaluates every row: Trainer's own drops the last rows too with `dataloader_drop_last`."""

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = asked and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = asked
