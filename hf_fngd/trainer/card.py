"""Corrects the model card: Trainer's names the optimizer of its arguments, not the one that trained."""

import functools
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_fngd.checks import shown
from hf_fngd.hub import CONFIG_NAME
from hf_fngd.optimizer import FNGD
from hf_fngd.settings import Settings
from hf_fngd.trainer.unwrapped import unwrap

_OPTIMIZER = re.compile(r"^- optimizer: Use .*?\n(?=- )", flags=re.MULTILINE | re.DOTALL)
_RATE = re.compile(r"^- learning_rate: .*$", flags=re.MULTILINE)
_VERSIONS = "### Framework versions"


def amended(card: str, optimizer: FNGD) -> str:
    """Put FNGD's learning rate and settings into a card, in place of those that Trainer wrote.

    A card that names no optimizer (TRL's) gets a section. A card that mentions FNGD already stays as it is.
    """
    settings = optimizer.settings.values()
    named = {name: settings[name] for name in ("lr", "sharing", "update")}
    named |= {name: value for name, value in settings.items() if value != getattr(Settings, name)}
    named["sharing"] = optimizer.preconditioner.policy.name
    values = ", ".join(f"{name}={shown(value)}" for name, value in named.items())
    line = f"- optimizer: FNGD of hf-fngd with {values}; all settings are in {CONFIG_NAME}\n"
    if _OPTIMIZER.search(card):
        rate = f"- learning_rate: {settings['lr']}"
        return _RATE.sub(lambda _: rate, _OPTIMIZER.sub(lambda _: line, card), count=1)
    if "FNGD" in card:
        return card
    section = f"### Optimizer\n\n{line}\n"
    before, found, after = card.partition(_VERSIONS)
    return before + section + found + after if found else f"{card.rstrip()}\n\n{section}"


def keep_true(trainer: Any) -> None:
    """Make a Trainer amend every card that it writes, and put ``fngd_config.json`` beside it; idempotent."""
    former = vars(trainer).get("create_model_card")
    if not (isinstance(former, functools.partial) and former.func is _write):
        # A weak reference: the end of the last other one is that of the optimizer, and the model is plain again.
        trainer.create_model_card = functools.partial(_write, weakref.ref(trainer), former)


def _write(of: Callable[[], Any], former: Callable[..., None] | None, *args: Any, **kwargs: Any) -> None:
    trainer = of()
    if former is None:
        type(trainer).create_model_card(trainer, *args, **kwargs)
    else:
        former(*args, **kwargs)
    file = Path(trainer.args.output_dir) / "README.md"
    try:
        optimizer = unwrap(trainer.optimizer)
    except TypeError:  # another one by now
        return
    if trainer.is_world_process_zero() and file.is_file():
        file.write_text(amended(file.read_text(encoding="utf-8"), optimizer), encoding="utf-8")
        save_settings(optimizer, file.parent)


def save_settings(optimizer: FNGD, folder: Path) -> None:
    """Write ``fngd_config.json``, except for a sharing policy that is an object, for which a config has no name."""
    if isinstance(optimizer.settings.sharing, str):
        optimizer.config.save_pretrained(folder)
