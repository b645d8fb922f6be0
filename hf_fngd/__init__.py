"""Inverse-free fast natural gradient descent (FNGD, arXiv 2403.03473) for the Hugging Face Trainer."""

from hf_fngd.attach import detach
from hf_fngd.clipping import clip_samples
from hf_fngd.config import FNGDConfig
from hf_fngd.coverage import CoverageReport
from hf_fngd.optimizer import FNGD
from hf_fngd.preconditioner import FNGDPreconditioner
from hf_fngd.sharing import Suspects, add_index, policy_names
from hf_fngd.trainer import FNGDCallback, FNGDFactory, last_complete_checkpoint

__version__ = "0.1.0"

__all__ = [
    "FNGD",
    "CoverageReport",
    "FNGDCallback",
    "FNGDConfig",
    "FNGDFactory",
    "FNGDPreconditioner",
    "Suspects",
    "__version__",
    "add_index",
    "clip_samples",
    "detach",
    "last_complete_checkpoint",
    "policy_names",
]
