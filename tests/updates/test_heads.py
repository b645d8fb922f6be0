"""Output heads: where the update rule is for matrices, the fallback rule steps them; their samples are weighed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from hf_fngd import FNGD, FNGDPreconditioner
from hf_fngd.updates.heads import output_heads

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 11}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
BART = {
    "d_model": 8,
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 1),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 16),
    "vocab_size": 11,
    "num_labels": 3,
}


class Plain(nn.Module):
    """As torchvision and many scripts call theirs; a layer within another module is none of the model's own."""

    def __init__(self, name: str, head: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = nn.ModuleDict({name: nn.Linear(4, 4)})
        self.add_module(name, head())


def bert() -> hf.BertForSequenceClassification:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3))


def lora() -> nn.Module:
    return get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"]))


def clip() -> hf.CLIPForImageClassification:
    """Its base model is itself."""
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = hf.CLIPConfig(text_config=SIZES, vision_config=vision, projection_dim=8, num_labels=3)
    return hf.CLIPForImageClassification(config)


def llava(**adapter: Any) -> nn.Module:
    """Its config has no number of tokens of its own."""
    text = hf.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)
    vision = hf.CLIPVisionConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=8, patch_size=4)
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision))
    return get_peft_model(model, LoraConfig(r=3, **adapter))


def adapted_head(model: nn.Module) -> nn.Module:
    """An adapter on the head, of as many rows as the model has labels."""
    return get_peft_model(model, LoraConfig(r=3, target_modules=["lm_head"]))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "BERT, classification": (bert, ["classifier.weight", "classifier.bias"]),
    "the same in PEFT": (
        lora,
        [
            f"base_model.model.classifier.{copy}.{leaf}"
            for copy in ("original_module", "modules_to_save.default")
            for leaf in ("weight", "bias")
        ],
    ),
    "BERT, two heads, one tied": (
        lambda: hf.BertForPreTraining(hf.BertConfig(**SIZES)),
        [
            "bert.embeddings.word_embeddings.weight",
            "cls.predictions.bias",
            "cls.seq_relationship.weight",
            "cls.seq_relationship.bias",
        ],
    ),
    "RoBERTa": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, num_labels=3)),
        ["classifier.out_proj.weight", "classifier.out_proj.bias"],
    ),
    "BART": (
        lambda: hf.BartForSequenceClassification(hf.BartConfig(**BART)),
        ["classification_head.out_proj.weight", "classification_head.out_proj.bias"],
    ),
    "question answering": (
        lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SIZES)),
        ["qa_outputs.weight", "qa_outputs.bias"],
    ),
    "multiple choice": (
        lambda: hf.BertForMultipleChoice(hf.BertConfig(**SIZES)),
        ["classifier.weight", "classifier.bias"],
    ),
    "CLIP": (clip, ["classifier.weight", "classifier.bias"]),
    "LLaVA's head trained beside adapters": (
        lambda: llava(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        [f"base_model.model.lm_head.{copy}.weight" for copy in ("original_module", "modules_to_save.default")],
    ),
    "LLaVA's head adapted": (
        lambda: llava(target_modules=["lm_head"]),
        [f"base_model.model.lm_head.{part}.weight" for part in ("base_layer", "lora_B.default")],
    ),
    "GPT-2's head adapted": (
        lambda: adapted_head(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, num_labels=3, tie_word_embeddings=False))),
        [f"base_model.model.lm_head.{part}.weight" for part in ("base_layer", "lora_B.default")],
    ),
    "GPT-2, untied": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, tie_word_embeddings=False)),
        ["lm_head.weight"],
    ),
    "GPT-2, classification": (lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)), ["score.weight"]),
    "a base model": (lambda: hf.BertModel(hf.BertConfig(**SIZES)), []),
    "a Linear": (lambda: Plain("fc", lambda: nn.Linear(4, 3)), ["fc.weight", "fc.bias"]),
    "the last of several": (
        lambda: Plain("classifier", lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))),
        ["classifier.2.weight", "classifier.2.bias"],
    ),
    "beside a model of transformers": (
        lambda: nn.ModuleDict({"encoder": hf.BertModel(hf.BertConfig(**SIZES)), "classifier": nn.Linear(8, 5)}),
        ["classifier.weight", "classifier.bias"],
    ),
    "no Linear": (lambda: Plain("head", lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())), []),
    "another name": (lambda: Plain("last", lambda: nn.Linear(4, 3)), []),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_which_parameters_are_output_heads(name: str) -> None:
    make, expected = MODELS[name]
    model = make()
    heads = output_heads(model)
    assert [name for name, p in model.named_parameters() if id(p) in heads] == expected


def rules(optimizer: FNGD) -> dict[str, tuple[str, float]]:
    return {n: (group["rule"], group["lr"]) for group in optimizer.param_groups for n in group["param_names"]}


@pytest.mark.parametrize(
    ("settings", "weight", "bias"),
    [
        ({"update": "muon"}, ("adam", 0.2), ("adam", 0.2)),
        ({"update": "block_muon", "fallback": "sgd"}, ("momentum", 0.2), ("momentum", 0.2)),
        ({"update": "adam"}, ("adam", 0.1), ("adam", 0.1)),
        ({"update": "momentum", "sharing": "never"}, ("momentum", 0.1), ("momentum", 0.1)),
        ({"update": "muon", "target_modules": ["classifier", "query"]}, ("muon", 0.1), ("adam", 0.1)),
        (
            {"update": "muon", "param_groups": [{"params": ["classifier"], "update": "block_muon"}]},
            ("block_muon", 0.1),
            ("adam", 0.1),
        ),
        ({"update": "muon", "param_groups": [{"params": ["classifier"], "lr": 0.3}]}, ("adam", 0.3), ("adam", 0.3)),
    ],
)
def test_who_steps_a_head(settings: dict[str, Any], weight: tuple[str, float], bias: tuple[str, float]) -> None:
    found = rules(FNGD(bert(), lr=0.1, fallback_lr=0.2, **settings))
    assert (found["classifier.weight"], found["classifier.bias"]) == (weight, bias)
    assert found["bert.encoder.layer.0.attention.self.query.weight"] == (settings["update"], 0.1)


@pytest.mark.parametrize(
    ("trained", "settings", "told"),
    [
        (["classifier"], {}, True),
        (["classifier", "LayerNorm"], {}, True),
        (["classifier"], {"update": "adam"}, False),
        (["classifier"], {"target_modules": ["classifier"]}, False),
        (["classifier", "query"], {}, False),
    ],
)
def test_an_update_rule_that_moves_nothing_says_so(
    trained: list[str], settings: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a head alone is trained on a frozen body."""
    model = bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    FNGD(model, **settings)
    assert ("moves nothing here" in caplog.text) == told


def test_a_heads_samples_are_weighed_and_adam_steps_it() -> None:
    """As the engine does in front of torch's AdamW."""
    x, y = torch.randint(11, (5, 6)), torch.tensor([0, 1, 2, 0, 1])
    models = []
    for fngd in (True, False):
        torch.manual_seed(0)
        model = bert().double().eval()
        if fngd:
            optimizer: Any = FNGD(model, lr=1e-3)
            report = optimizer.coverage()
            assert {"classifier.weight", "classifier.bias"} <= set(report.weighed)
            assert not {"classifier.weight", "classifier.bias"} & {*report.preconditioned, *report.plain}
        else:
            engine = FNGDPreconditioner(model)
            optimizer = torch.optim.AdamW(model.classifier.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0)
            engine.follow(optimizer)
        (10 * cross_entropy(model(x).logits, y)).backward()
        optimizer.step()
        models.append(model.classifier.weight.detach())
    torch.testing.assert_close(*models, rtol=0, atol=1e-12)
