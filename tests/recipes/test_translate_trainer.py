"""Model, scores, plot of the translation recipe."""

import math

import pytest
import sacrebleu
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MarianMTModel

import translate
from tests.recipes.translate_pairs import PAIRS, TINY_MODEL, write_splits
from text.plot import plot_learning_curve
from text.tokenizer import train_tokenizer
from translation.arguments import DataArguments, ModelArguments
from translation.metric import SacreBleu
from translation.model import build_model
from translation.trainer import TranslationTrainer, mean_nll


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = train_tokenizer([pair["de"] for pair in PAIRS], 300)
    return build_model(
        tokenizer,
        ModelArguments(d_model=64, encoder_layers=2, decoder_layers=1, ffn_dim=128, num_heads=4),
        DataArguments(max_source_length=40, max_target_length=30, num_beams=3),
    )


def test_model_is_the_conventional_transformer(model):
    config = model.config
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (64, 2, 1)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (128, 128)
    assert config.activation_function == "relu"
    assert config.max_position_embeddings == 40
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    assert model.model.decoder.embed_tokens.weight is embedding
    assert model.model.encoder.embed_scale == model.model.decoder.embed_scale == 8
    assert not model.model.encoder.embed_positions.weight.requires_grad
    generation = model.generation_config
    assert (generation.num_beams, generation.max_length, generation.eos_token_id) == (3, 30, config.eos_token_id)


def test_model_starts_at_unit_scale(model):
    embedding = model.get_input_embeddings().weight
    assert embedding[model.config.pad_token_id].abs().sum() == 0
    assert embedding[1:].std().item() == pytest.approx(64**-0.5, rel=0.05)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            fan = sum(module.weight.shape)
            assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05), name
            assert module.bias.abs().sum() == 0, name


def test_embeddings_that_are_not_tied_are_three_matrices(tmp_path):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([pair["de"] for pair in PAIRS], 300)
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "ffn_dim": 64, "num_heads": 2}
    built = build_model(tokenizer, ModelArguments(**sizes, tie_word_embeddings=False), DataArguments())
    built.save_pretrained(tmp_path)
    for model in (built, MarianMTModel.from_pretrained(tmp_path)):
        tables = [stack.embed_tokens.weight for stack in (model.model.encoder, model.model.decoder)]
        matrices = [*tables, model.lm_head.weight]
        assert len({id(p) for p in model.parameters()} & {id(matrix) for matrix in matrices}) == 3
        for table in tables:
            assert table[model.config.pad_token_id].abs().sum() == 0
            assert table[1:].std().item() == pytest.approx(64**-0.5, rel=0.05)
        fan = sum(model.lm_head.weight.shape)
        assert model.lm_head.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)


@pytest.mark.parametrize("bleu", [True, False])
def test_learning_curve_is_a_png(tmp_path, bleu):
    history = [{"epoch": 1, "loss": 3.0}, {"epoch": 1, "eval_loss": 2.5}, {"epoch": 2, "loss": 2.0}]
    if bleu:
        history.append({"epoch": 2, "eval_loss": 2.1, "eval_bleu": 11.0})
    path = tmp_path / "learning_curve.png"
    plot_learning_curve(history, path, "a run")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_likelihoods_are_those_of_each_pair_by_itself(tmp_path, monkeypatch):
    scored = []
    log_likelihoods = TranslationTrainer.log_likelihoods

    def spy(self, rows):
        result = log_likelihoods(self, rows)
        scored.append((self.model, rows, result))
        return result

    monkeypatch.setattr(TranslationTrainer, "log_likelihoods", spy)
    argv = [f"--dataset_name={write_splits(tmp_path / 'pairs')}", f"--output_dir={tmp_path / 'out'}", *TINY_MODEL]
    argv += ["--optimizer=adamw", "--max_steps=12", "--disable_tqdm=true", "--per_device_eval_batch_size=5"]
    report = translate.main([*argv, "--dropout=0.5"])
    (model, validation, _), (_, first, scores), (_, test, others) = scored
    assert (len(validation), len(first), len(test)) == (16, 16, 16)
    for row in (0, 15):  # no dropout, no smoothing, no padding
        labels = torch.tensor([first[row]["labels"]])
        shifted = torch.cat([torch.tensor([[0]]), labels[:, :-1]], dim=1)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([first[row]["input_ids"]]), decoder_input_ids=shifted).logits
        assert scores[row, 0].item() == pytest.approx(F.cross_entropy(logits[0], labels[0], reduction="sum").item())
        assert scores[row, 1] == labels.numel()
    assert report["train_nll"] == pytest.approx((scores[:, 0].sum() / scores[:, 1].sum()).item())
    assert report["predict_nll"] == mean_nll(others)
    assert report["eval_nll"] < report["eval_loss"]  # which has label smoothing


def test_the_mean_is_over_tokens():
    assert mean_nll(torch.tensor([[3.0, 1.0], [1.0, 3.0]])) == 1.0
    assert math.isnan(mean_nll(torch.tensor([[math.nan, 1.0]])))


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
    names = ("score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len")
    assert {key: ours[key] for key in ours if key != "signature"} == {name: getattr(theirs, name) for name in names}


def test_signature_tells_tokenization_and_version():
    signature = SacreBleu().compute(predictions=REFERENCES, references=REFERENCES)["signature"]
    assert signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


def test_lowercased_bleu_is_sacrebleus():
    predictions = [text.upper() for text in REFERENCES]
    ours = SacreBleu(lowercase=True).compute(predictions=predictions, references=REFERENCES)
    assert ours["score"] == sacrebleu.corpus_bleu(predictions, [REFERENCES], lowercase=True).score
    assert SacreBleu().compute(predictions=predictions, references=REFERENCES)["score"] < ours["score"]
    assert "|case:lc|" in ours["signature"]


def test_batches_add_up_to_the_corpus():
    metric = SacreBleu()
    predictions = [REFERENCES[0], REFERENCES[2], REFERENCES[1]]
    for prediction, reference in zip(predictions, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["score"] == sacrebleu.corpus_bleu(predictions, [REFERENCES]).score


def test_batches_of_few_shapes(tmp_path, monkeypatch):
    shapes, compute = set(), TranslationTrainer.compute_loss

    def seen(self, model, inputs, *args, **kwargs):
        shapes.update(inputs[name].shape[1] for name in ("input_ids", "labels"))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TranslationTrainer, "compute_loss", seen)
    words = [f"--dataset_name={write_splits(tmp_path / 'pairs')}", f"--output_dir={tmp_path / 'out'}", *TINY_MODEL]
    words += ["--max_steps=11", "--per_device_train_batch_size=16", "--pad_to_multiple_of=16", "--save_strategy=no"]
    translate.main([*words, "--eval_strategy=no", "--do_eval=false", "--do_predict=false", "--optimizer=adamw"])
    assert shapes <= {16, 32}
