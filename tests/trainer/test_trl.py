"""FNGD under TRL's trainers, which put a forward of their own on the model, or wrap it, behind the optimizer."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers as hf
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_fngd import FNGD, FNGDCallback, FNGDConfig, FNGDFactory, unwrap
from hf_fngd.engine.reasons import USED_ELSEWHERE
from tests.modes.harness import arguments
from tests.modes.nets import SIZES, TOKENS, VOCABULARY, llama
from tests.modes.wrapped import lora, tokenizer
from tests.reference import Clipping, Use, norm_of
from tests.steps import relative_error

# TRL and PEFT use names that transformers has changed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

SAMPLES, STEPS = 12, 3


def text(tokens: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return "".join(f" t{token}" for token in torch.randint(2, VOCABULARY, (tokens,), generator=generator).tolist())


def texts(first: int, *lengths: int) -> list[str]:
    """As many as there are samples; their lengths take turns."""
    return [text(lengths[n % len(lengths)], first + n) for n in range(SAMPLES)]


def score(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def reward_model() -> nn.Module:
    torch.manual_seed(0)
    config = {"intermediate_size": 12, "num_key_value_heads": 2, "num_labels": 1}
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**(SIZES | TOKENS | config)))


class Case(NamedTuple):
    trainer: type
    config: type
    columns: dict[str, list[Any]]
    changes: Mapping[str, Any] = {}
    make: Callable[[], nn.Module] = llama
    options: Mapping[str, Any] = {}


PROMPTS = {"prompt": texts(0, 3)}
PAIRS = {"chosen": texts(100, 7, 3, 5), "rejected": texts(200, 4, 6)}
JUDGED = PROMPTS | {"completion": PAIRS["chosen"], "label": [n % 2 == 0 for n in range(SAMPLES)]}
GENERATED = {"max_completion_length": 4, "num_generations": 4}
CASES = {
    "SFT": Case(trl.SFTTrainer, trl.SFTConfig, {"text": PAIRS["chosen"]}),
    "Reward": Case(trl.RewardTrainer, trl.RewardConfig, PAIRS, make=reward_model),
    "DPO": Case(trl.DPOTrainer, trl.DPOConfig, PROMPTS | PAIRS),
    "DPO, precomputed": Case(trl.DPOTrainer, trl.DPOConfig, PROMPTS | PAIRS, {"precompute_ref_log_probs": True}),
    "KTO": Case(trl.KTOTrainer, trl.KTOConfig, JUDGED),
    "GRPO": Case(trl.GRPOTrainer, trl.GRPOConfig, PROMPTS, GENERATED, options={"reward_funcs": score}),
    "RLOO": Case(trl.RLOOTrainer, trl.RLOOConfig, PROMPTS, {**GENERATED, "beta": 0.0}, options={"reward_funcs": score}),
}


def adapters(case: Case) -> peft.LoraConfig:
    return lora(target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS" if case.make is reward_model else "CAUSAL_LM")


FNGD_SETTINGS = {"lr": 1e-2, "update": "adam"}


def trained(
    case: Case,
    folder: Path,
    passed: str,
    optimizer: Callable[[nn.Module], Any] | None = None,
    callbacks: Any = (),
    **changes: Any,
) -> tuple[Any, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The trainer after some steps, its gradients in each step, and those that the definitions say."""
    model, options = case.make(), dict(case.options)
    if passed == "adapters":
        model = peft.get_peft_model(model, adapters(case))
    elif passed == "optimizers" and case.trainer in (trl.DPOTrainer, trl.KTOTrainer):
        options |= {} if case.changes else {"ref_model": case.make()}
    if passed == "inside":
        options["peft_config"] = adapters(case)
    else:
        make = optimizer or (lambda model: FNGD(model, **FNGD_SETTINGS))
        options["optimizers"] = (make(model), None)
    found, expected = [], []

    class Compared(case.trainer):  # type: ignore[misc]
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if optimizer is None:
                plain = copy.deepcopy(self.accelerator.unwrap_model(model))
                expected.append(by_definition(plain, lambda: super(Compared, self).compute_loss(plain, dict(inputs))))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    values = (
        {"max_steps": STEPS, "learning_rate": 1e-2, "bf16": False, "activation_checkpointing": True}
        | case.changes
        | changes
    )
    args = arguments(folder, case.config, **values)
    data = Dataset.from_dict(case.columns)
    trainer = Compared(model=model, args=args, train_dataset=data, processing_class=tokenizer(), **options)
    for callback in (Recorder(), *callbacks):
        trainer.add_callback(callback)
    if passed == "inside":
        trainer.optimizer_cls_and_kwargs = (FNGDFactory, {"args": args, "update": "adam"})
    trainer.train()
    assert len(found) == STEPS
    return trainer, found, expected


def by_definition(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every trained Linear layer of a plain model that is called: the clipped gradient, and the plain one."""
    model.activation_checkpointing_disable()
    names = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and one.weight.requires_grad]
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if torch.is_grad_enabled():
                assert name not in caught
                caught[name] = (inputs[0].detach().double(), output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(catch(name)) for name in names]
    grads = torch.autograd.grad(loss(), [output for _, output in caught.values()])
    for handle in handles:
        handle.remove()
    found = {}
    for (name, (a, _)), g in zip(caught.items(), (g.double() for g in grads), strict=True):
        h = torch.einsum("nto,nti->noi", g, a)
        weight, module = f"{name}.weight", model.get_submodule(name)
        uses = [Use(norm_of(module, a[n], g[n], [], False, False), {weight: h[n].flatten()}) for n in range(len(a))]
        clipped, _ = Clipping().gradients([{(name, 0): use} for use in uses])
        found[weight] = (clipped[weight].view_as(h[0]), h.sum(0))
    return found


WAYS = [("optimizers", False), ("adapters", False), ("inside", False), ("optimizers", True)]


@pytest.mark.parametrize(("passed", "bf16"), WAYS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_samples_are_weighed(case: Case, passed: str, bf16: bool, tmp_path: Path) -> None:
    """In mixed precision, TRL's default, Accelerate puts one more forward on the model."""
    trainer, found, expected = trained(case, tmp_path, passed, bf16=bf16)
    report = unwrap(trainer.optimizer).coverage()
    assert not report.missed
    assert not report.note
    assert len(report.preconditioned) >= 8
    pairs = [(step[name], exact[name]) for step, exact in zip(found, expected, strict=True) for name in exact]
    assert len(pairs) >= STEPS * len(report.preconditioned)
    assert max(relative_error(gradient.double(), clipped) for gradient, (clipped, _) in pairs) < (
        5e-2 if bf16 else 1e-5
    )
    assert max(relative_error(plain, clipped) for _, (clipped, plain) in pairs) > 0.5


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_whose_head_is_tied(tmp_path: Path) -> None:
    """TRL's head multiplies by the embedding's weight, which is plain then, as in an eager model."""
    compiler, runs = {"torch_compile": True, "torch_compile_backend": "aot_eager"}, []
    for changes in ({}, compiler):
        trainer, found, _ = trained(
            CASES["SFT"],
            tmp_path,
            "optimizers",
            partial(FNGD, **FNGD_SETTINGS),
            activation_checkpointing=False,
            **changes,
        )
        gradients = [{name.removeprefix("_orig_mod."): p for name, p in step.items()} for step in found]
        runs.append((unwrap(trainer.optimizer).coverage(), gradients))
    (report, eager), (compiled_report, compiled) = runs
    assert report == compiled_report
    assert report.plain["model.embed_tokens.weight"] == USED_ELSEWHERE
    assert not compiled_report.note
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def uniform(model: nn.Module) -> FNGD:
    return FNGD(model, sharing="uniform", **FNGD_SETTINGS)


@pytest.mark.parametrize("passed", ["optimizers", "adapters"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_with_equal_weights_it_trains_as_the_plain_optimizer_does(case: Case, passed: str, tmp_path: Path) -> None:
    runs = [trained(case, tmp_path, passed, optimizer=make)[0].model for make in (uniform, adamw)]
    for (name, p), q in zip(runs[0].named_parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_optimizer_that_is_older_than_the_adapters_names_the_cure(case: Case, tmp_path: Path) -> None:
    model = case.make()
    trainer = case.trainer(
        model=model,
        args=arguments(tmp_path, case.config, **case.changes, bf16=False, activation_checkpointing=True),
        train_dataset=Dataset.from_dict(case.columns),
        processing_class=tokenizer(),
        optimizers=(FNGD(model), None),
        peft_config=adapters(case),
        **case.options,
    )
    with pytest.raises(RuntimeError, match=r"set trainer.optimizer_cls_and_kwargs = \(FNGDFactory, \{...\}\) before"):
        trainer.train()


def test_the_card_that_trl_writes_with_each_checkpoint_has_the_settings(tmp_path: Path) -> None:
    case = CASES["DPO, precomputed"]
    trained(case, tmp_path, "optimizers", uniform, callbacks=[FNGDCallback()], save_strategy="steps", save_steps=STEPS)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "### Optimizer\n\n- optimizer: FNGD of hf-fngd with lr=0.01, sharing='uniform', update='adam'; all" in card
    assert FNGDConfig.from_pretrained(tmp_path).sharing == "uniform"
