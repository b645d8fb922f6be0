"""What only the Hugging Face Trainer needs: a callback, an optimizer factory, and the checkpoint to resume from."""

from hf_fngd.trainer.callbacks import FNGDCallback
from hf_fngd.trainer.checkpoints import last_complete_checkpoint
from hf_fngd.trainer.factory import FNGDFactory
from hf_fngd.trainer.unwrapped import unwrap

__all__ = ["FNGDCallback", "FNGDFactory", "last_complete_checkpoint", "unwrap"]
