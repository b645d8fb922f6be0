"""What only the Hugging Face Trainer needs: a callback and an optimizer factory."""

from hf_fngd.trainer.callbacks import FNGDCallback
from hf_fngd.trainer.factory import FNGDFactory

__all__ = ["FNGDCallback", "FNGDFactory"]
