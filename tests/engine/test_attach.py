"""An attached model looks, saves, copies and, once detached, is as it was."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_fngd import FNGD, FNGDPreconditioner, detach
from tests.nets import Net, data, gradient, graph_nodes, loss, net, parameters, train


def snapshot(model: nn.Module) -> list[tuple[str, type, dict[str, object]]]:
    """Everything that an instance is: for each module its name, class and attributes."""
    return [
        (name, type(module), {key: value for key, value in vars(module).items() if not key.startswith("_")})
        for name, module in model.named_modules()
    ]


def test_a_detached_model_is_what_it_was() -> None:
    model = net()
    before, keys = snapshot(model), [set(vars(module)) for module in model.modules()]
    values = parameters(model)
    preconditioner = FNGDPreconditioner(model)
    assert type(model.fc1) is not nn.Linear
    loss(model, *data(6)).backward()
    preconditioner.step()
    preconditioner.detach()
    assert snapshot(model) == before
    assert [set(vars(module)) for module in model.modules()] == keys
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    model.zero_grad()
    untouched = net()
    for each in (model, untouched):
        loss(each, *data(6)).backward()
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_detach_is_idempotent_and_leaves_plain_models_alone() -> None:
    model = net()
    before = snapshot(model)
    detach(model)
    assert snapshot(model) == before
    preconditioner = FNGDPreconditioner(model)
    for _ in range(2):
        preconditioner.detach()
        assert snapshot(model) == before


def test_a_model_can_be_attached_again_after_detaching() -> None:
    model = net()
    FNGD(model).detach()
    assert type(model.fc1) is nn.Linear
    optimizer = FNGD(model)
    train(model, optimizer, 1)
    assert set(optimizer.coverage().preconditioned) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert set(optimizer.coverage().plain) == {"norm.weight", "norm.bias"}


def test_a_model_that_is_itself_a_layer_can_be_attached() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4, dtype=torch.float64)
    preconditioner = FNGDPreconditioner(model)
    loss(model, *data(6)).backward()
    preconditioner.step()
    assert preconditioner.coverage().preconditioned == ("weight", "bias")
    assert type(pickle.loads(pickle.dumps(model))) is type(copy.deepcopy(model)) is nn.Linear
    preconditioner.detach()
    assert type(model) is nn.Linear
    assert set(vars(model)) == set(vars(nn.Linear(1, 1)))


def test_nothing_shows_on_the_outside() -> None:
    plain, attached = net(), net()
    FNGDPreconditioner(attached)
    assert repr(attached) == repr(plain)
    assert list(attached.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in attached.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert isinstance(attached, Net)
    assert isinstance(attached.fc1, nn.Linear)
    for attached_type, plain_type in ((type(attached), Net), (type(attached.fc1), nn.Linear)):
        assert (attached_type.__name__, attached_type.__module__) == (plain_type.__name__, plain_type.__module__)
        assert attached_type.__qualname__ == plain_type.__qualname__
        assert attached_type.__doc__ == plain_type.__doc__
        assert inspect.signature(attached_type.forward) == inspect.signature(plain_type.forward)
        assert attached_type.forward.__doc__ == plain_type.forward.__doc__


def test_only_this_instance_is_attached() -> None:
    first, second = net(), net()
    FNGDPreconditioner(first)
    assert type(second.fc1) is nn.Linear
    FNGDPreconditioner(second)
    assert type(second.fc1) is type(first.fc1)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": through_pickle, "torch.save": through_torch_save, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)
def test_copies_are_plain_models_that_train_on_their_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    expected = [(name, kind) for name, kind, _ in snapshot(model)]
    optimizer = FNGD(model)
    loss(model, *data(6)).backward()
    optimizer.step()
    optimizer.zero_grad()
    values = parameters(model)
    copied = clone(model)
    assert [(name, kind) for name, kind, _ in snapshot(copied)] == expected
    assert b"hf_fngd" not in pickle.dumps(model)
    assert not any(key.startswith("_fngd") for module in copied.modules() for key in vars(module))
    state = pickle.dumps(optimizer.preconditioner.state_dict())
    x, y = data(6, seed=5)
    plain = net()
    plain.load_state_dict(copied.state_dict())
    sgd, reference = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (copied, plain))
    for each, optim in ((copied, sgd), (plain, reference)):
        for _ in range(2):
            optim.zero_grad()
            loss(each, x, y).backward()
            optim.step()
    assert all(torch.equal(p, q) for p, q in zip(copied.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert pickle.dumps(optimizer.preconditioner.state_dict()) == state


def test_a_copy_can_have_an_optimizer_of_its_own() -> None:
    model = net()
    FNGD(model)
    copied = copy.deepcopy(model)
    optimizer = FNGD(copied)
    loss(copied, *data(6)).backward()
    optimizer.step()
    assert optimizer.coverage().preconditioned


TRAINED_NORMALLY = {
    "eval": lambda model, x: model.eval()(x),
    "no_grad": lambda model, x: torch.no_grad()(model)(x),
    "inference_mode": lambda model, x: torch.inference_mode()(model)(x),
    "eval without gradients": lambda model, x: torch.no_grad()(model.eval())(x),
}


@pytest.mark.parametrize("call", TRAINED_NORMALLY.values(), ids=TRAINED_NORMALLY)
def test_outside_of_training_the_layers_own_forward_runs(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, plain, (x, _) = net(), net(), data(6)
    FNGDPreconditioner(model)
    assert set(graph_nodes(model(x))) != set(graph_nodes(plain(x)))
    found, own = call(model, x), call(plain, x)
    assert torch.equal(found, own)
    assert list(graph_nodes(found)) == list(graph_nodes(own))


def test_a_training_forward_is_the_plain_one_bit_for_bit() -> None:
    model, plain, (x, _) = net(), net(), data(6, 3)
    FNGDPreconditioner(model)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("base", [FSDPModule, object])
def test_a_class_that_somebody_put_on_top_meanwhile_stays_and_can_be_attached_again(base: type) -> None:
    """As fully_shard does."""
    model, plain = net(), net()
    former = FNGDPreconditioner(model)
    classes = []
    for layer in (model.fc1, model.fc2):
        bases = (FSDPModule, type(layer)) if base is FSDPModule else (type(layer),)
        classes.append(type("Sharded", bases, {}))
        layer.__class__ = classes[-1]
    former.detach()
    assert [type(model.fc1), type(model.fc2)] == classes
    for each in (model, plain):
        loss(each, *data(6)).backward()
    assert torch.equal(gradient(model), gradient(plain))
    if base is FSDPModule:  # which is looked through; another subclass of Linear may compute something else
        again = FNGDPreconditioner(model)
        loss(model, *data(6)).backward()
        again.step()
        assert again.coverage().missed == {}
        assert len(again.layers) == 2


# Another one on the model ----------------------------------------------------------------------------------


def submodule_of(model: Net) -> nn.Module:
    return model.fc1


def parent_of(model: Net) -> nn.Module:
    return nn.Sequential(model)


SECOND: dict[str, tuple[Callable[[Net], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "same model": (lambda model: model, {}, {}),
    "other layers": (lambda model: model, {"target_modules": ["fc1"]}, {"target_modules": ["fc2"]}),
    "some layers": (lambda model: model, {"target_modules": ["fc2"]}, {}),
    "submodule": (submodule_of, {}, {}),
    "parent": (parent_of, {}, {}),
}


@pytest.mark.parametrize("attach", [FNGD, FNGDPreconditioner])
@pytest.mark.parametrize(("choose", "first", "second"), SECOND.values(), ids=SECOND)
def test_a_second_one_on_the_model_is_refused_and_changes_nothing(
    choose: Callable[[Net], nn.Module], first: dict[str, Any], second: dict[str, Any], attach: type
) -> None:
    model = net()
    optimizer = FNGD(model, **first)
    other = choose(model)
    types = [type(module) for module in other.modules()]
    with pytest.raises(RuntimeError, match=r"attached to another FNGD already; call hf_fngd.detach\(model\) first"):
        attach(other, **second)
    assert [type(module) for module in other.modules()] == types
    train(model, optimizer, 1)
    assert optimizer.coverage().missed == {}


def test_a_forward_of_the_instances_own_is_refused_and_leaves_the_model_alone() -> None:
    model = net()
    model.fc2.forward = lambda x: x
    with pytest.raises(RuntimeError, match="build FNGD before the model is prepared"):
        FNGDPreconditioner(model)
    assert type(model.fc1) is type(net().fc1)
    del model.fc2.forward
    FNGDPreconditioner(model)


def test_detaching_a_second_time_leaves_another_preconditioner_alone() -> None:
    model = net()
    first = FNGDPreconditioner(model)
    detach(model)
    second = FNGDPreconditioner(model, sharing="never")
    first.detach()
    loss(model, *data(6, 3)).backward()
    second.step()
    assert second.coverage().missed == {}
    assert torch.isfinite(second.policy.rho).all()


# transformers --------------------------------------------------------------------------------------------


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def test_save_pretrained_writes_what_the_plain_model_would(tmp_path) -> None:
    plain, attached = bert(), bert()
    FNGDPreconditioner(attached)
    for model, folder in ((plain, "plain"), (attached, "attached")):
        model.save_pretrained(tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for name in names:
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "attached")
    assert type(loaded) is BertForSequenceClassification
    for p, q in zip(loaded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_transformer_trains_and_generates() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(2, 20, (3, 6))
    plain = model.eval().generate(tokens, max_new_tokens=4, do_sample=False)
    optimizer = FNGD(model, lr=0.0)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert len(optimizer.preconditioner.layers) == 4
    assert optimizer.coverage().missed == {}
    assert torch.equal(model.eval().generate(tokens, max_new_tokens=4, do_sample=False), plain)
