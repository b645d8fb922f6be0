"""What the tests of the Hub save and load."""

from hf_fngd.config import FNGDConfig

CONFIG = FNGDConfig(lr=0.25, sharing="never", damping=0.01, target_modules=["fc1", "fc2"])
MAIN, OLD = "a" * 40, "b" * 40


def load(seed, name="user/repo", **options):
    return FNGDConfig.from_pretrained(name, cache_dir=seed.cache, **options)
