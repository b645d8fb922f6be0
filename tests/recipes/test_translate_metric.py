"""BLEU of the translation recipe against sacreBLEU itself."""

from __future__ import annotations

import pytest
import sacrebleu

from translation.metric import SacreBleu

REFERENCES = ["Zwei Männer warten draußen.", "Ein Hund läuft über die Wiese.", "Eine Frau schläft auf dem Sofa."]


@pytest.mark.parametrize(
    "predictions",
    [
        REFERENCES,
        ["Zwei Männer warten hier.", "Ein Hund läuft über das Gras.", "Eine Frau sitzt auf dem Sofa."],
        ["", "Ein Hund.", "x"],
    ],
    ids=["perfect", "close", "poor"],
)
def test_bleu_is_sacrebleus(predictions):
    ours = SacreBleu().compute(predictions=predictions, references=REFERENCES)
    theirs = sacrebleu.corpus_bleu(predictions, [REFERENCES])
    assert {key: ours[key] for key in ours if key != "signature"} == {
        "score": theirs.score,
        "counts": theirs.counts,
        "totals": theirs.totals,
        "precisions": theirs.precisions,
        "bp": theirs.bp,
        "sys_len": theirs.sys_len,
        "ref_len": theirs.ref_len,
    }


def test_signature_tells_tokenization_and_version():
    signature = SacreBleu().compute(predictions=REFERENCES, references=REFERENCES)["signature"]
    assert signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


def test_batches_add_up_to_the_corpus():
    metric = SacreBleu()
    predictions = [REFERENCES[0], REFERENCES[2], REFERENCES[1]]
    for prediction, reference in zip(predictions, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["score"] == sacrebleu.corpus_bleu(predictions, [REFERENCES]).score
