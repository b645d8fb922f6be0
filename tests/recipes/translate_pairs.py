"""64 sentence pairs for the tests of the translation recipe."""

import itertools
import json
from pathlib import Path

SUBJECTS = [("A man", "Ein Mann"), ("A woman", "Eine Frau"), ("A girl", "Ein Mädchen"), ("My uncle", "Mein Onkel")]
VERBS = [("runs", "läuft"), ("sings", "singt"), ("sleeps", "schläft"), ("waits", "wartet")]
PLACES = [("here", "hier"), ("outside", "draußen"), ("above", "darüber"), ("at home", "zu Hause")]
PAIRS = [
    {"en": f"{s[0]} {v[0]} {p[0]}.", "de": f"{s[1]} {v[1]} {p[1]}."}
    for s, v, p in itertools.product(SUBJECTS, VERBS, PLACES)
]

TINY_MODEL = ["--d_model=16", "--encoder_layers=1", "--decoder_layers=1", "--ffn_dim=32", "--num_heads=2"]
TINY_MODEL += ["--vocab_size=300", "--max_source_length=32", "--max_target_length=32"]


def write_splits(folder: Path, *, nested: bool = False, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """Write a dataset folder of JSON lines: all 64 pairs for training, the first 16 for every other split."""
    folder.mkdir()
    for split in splits:
        pairs = PAIRS if split == "train" else PAIRS[:16]
        lines = [json.dumps({"translation": pair} if nested else pair, ensure_ascii=False) for pair in pairs]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
