"""FNGD for the Hugging Face Trainer: sample clipping and Muon's update, or natural gradients (arXiv 2403.03473)."""

from hf_fngd.clipping import clip_samples
from hf_fngd.config import FNGDConfig
from hf_fngd.engine.attach import detach
from hf_fngd.engine.coverage import CoverageReport
from hf_fngd.optimizer import FNGD
from hf_fngd.preconditioner import FNGDPreconditioner
from hf_fngd.trainer import FNGDCallback, FNGDFactory, last_complete_checkpoint, unwrap
from hf_fngd.updates.base import learning_rate_from_adamw
from hf_fngd.weights.base import policy_names

__version__ = "0.2.0"

__all__ = [
    "FNGD",
    "CoverageReport",
    "FNGDCallback",
    "FNGDConfig",
    "FNGDFactory",
    "FNGDPreconditioner",
    "__version__",
    "clip_samples",
    "detach",
    "last_complete_checkpoint",
    "learning_rate_from_adamw",
    "policy_names",
    "unwrap",
]
