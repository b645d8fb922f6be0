"""BLEU as a local `evaluate.Metric`: sacreBLEU without a download."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sacrebleu.metrics import BLEU


class SacreBleu(evaluate.Metric):
    """Corpus BLEU of detokenized text by sacreBLEU, with the signature that makes the number comparable.

    `evaluate.load("sacrebleu")` needs the Hub; this class is in the same form and needs nothing.

    Args:
        lowercase: Whether upper and lower case are the same, as papers on Multi30K have it.
        **kwargs: evaluate.Metric's.

    Example:
        >>> SacreBleu().compute(predictions=["Ein Mann schläft."], references=["Ein Mann schläft."])["score"]
        100.00000000000004
    """

    def __init__(self, lowercase: bool = False, **kwargs: Any) -> None:
        self.lowercase = lowercase
        # In memory: a cache file on disk would be shared, and locked, by every process of a distributed run.
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Corpus BLEU by sacreBLEU.",
            citation="Post (2018), A Call for Clarity in Reporting BLEU Scores",
            inputs_description="predictions: translations; references: one reference a translation",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        bleu = BLEU(lowercase=self.lowercase)
        result = bleu.corpus_score(predictions, [references])
        names = ("score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len")
        return {name: getattr(result, name) for name in names} | {"signature": str(bleu.get_signature())}
