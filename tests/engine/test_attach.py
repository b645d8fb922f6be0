"""An attached model looks, saves, copies and, once detached, is as it was."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_fngd import FNGD, FNGDPreconditioner, detach
from tests.modes.nets import bert, gpt2
from tests.nets import Net, data, loss, net
from tests.steps import (
    assert_equal,
    digest,
    gradient,
    graph_nodes,
    one_step,
    parameters,
    through_file,
    train,
    with_engine,
    with_fngd,
)


def snapshot(model: nn.Module) -> list[tuple[str, type, dict[str, object]]]:
    """Everything that an instance is: for each module its name, class and attributes."""
    return [
        (name, type(module), {key: value for key, value in vars(module).items() if not key.startswith("_")})
        for name, module in model.named_modules()
    ]


def test_a_detached_model_is_what_it_was_and_can_be_attached_again() -> None:
    model, untouched = net(), net()
    before, keys = snapshot(model), [set(vars(module)) for module in model.modules()]
    detach(model)  # leaves a plain model alone
    for _ in range(2):
        optimizer = FNGD(model, lr=0.0)
        assert type(model.fc1) is not nn.Linear
        train(model, optimizer, 1)
        assert set(optimizer.coverage().preconditioned) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
        for _ in range(2):
            optimizer.detach()
            assert snapshot(model) == before
            assert [set(vars(module)) for module in model.modules()] == keys
    assert_equal(model, untouched)
    model.zero_grad()
    for each in (model, untouched):
        loss(each, *data(6)).backward()
    assert torch.equal(gradient(model), gradient(untouched))


def test_a_model_that_is_itself_a_layer_can_be_attached() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4, dtype=torch.float64)
    preconditioner = FNGDPreconditioner(model)
    one_step(model, preconditioner, *data(6))
    assert preconditioner.coverage().preconditioned == ("weight", "bias")
    assert type(pickle.loads(pickle.dumps(model))) is type(copy.deepcopy(model)) is nn.Linear
    preconditioner.detach()
    assert type(model) is nn.Linear
    assert set(vars(model)) == set(vars(nn.Linear(1, 1)))


def test_nothing_shows_on_the_outside() -> None:
    plain, attached = net(), net()
    _kept = FNGDPreconditioner(attached)
    assert repr(attached) == repr(plain)
    assert list(attached.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in attached.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert isinstance(attached, Net)
    assert isinstance(attached.fc1, nn.Linear)
    assert type(plain.fc1) is nn.Linear  # another instance
    for attached_type, plain_type in ((type(attached), Net), (type(attached.fc1), nn.Linear)):
        assert (attached_type.__name__, attached_type.__module__) == (plain_type.__name__, plain_type.__module__)
        assert attached_type.__qualname__ == plain_type.__qualname__
        assert attached_type.__doc__ == plain_type.__doc__
        own, others = (inspect.signature(one.forward).parameters for one in (attached_type, plain_type))
        assert {**own, **others} == dict(own)
        assert set(own) - set(others) == ({"sample_ids"} if plain_type is Net else set())
        assert attached_type.forward.__doc__ == plain_type.forward.__doc__


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


COPIES = {
    "pickle": through_pickle,
    "torch.save": lambda model: through_file(model, weights_only=False),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("clone", COPIES.values(), ids=COPIES)
def test_copies_are_plain_models_that_train_on_their_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    expected = [(name, kind) for name, kind, _ in snapshot(model)]
    optimizer = FNGD(model)
    one_step(model, optimizer, *data(6))
    optimizer.zero_grad()
    values = parameters(model)
    copied = clone(model)
    assert [(name, kind) for name, kind, _ in snapshot(copied)] == expected
    assert b"hf_fngd" not in pickle.dumps(model)
    assert not any(key.startswith("_fngd") for module in copied.modules() for key in vars(module))
    state = pickle.dumps(optimizer.preconditioner.state_dict())
    plain = net()
    plain.load_state_dict(copied.state_dict())
    for make in (lambda model: torch.optim.SGD(model.parameters(), lr=0.1), FNGD):
        for each, of in ((copied, make(copied)), (plain, make(plain))):
            train(each, of, 2)
        assert_equal(copied, plain)
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert pickle.dumps(optimizer.preconditioner.state_dict()) == state


TRAINED_NORMALLY = {
    "eval": lambda model, x: model.eval()(x),
    "no_grad": lambda model, x: torch.no_grad()(model)(x),
    "inference_mode": lambda model, x: torch.inference_mode()(model)(x),
    "eval without gradients": lambda model, x: torch.no_grad()(model.eval())(x),
}


@pytest.mark.parametrize("call", TRAINED_NORMALLY.values(), ids=TRAINED_NORMALLY)
def test_outside_of_training_the_layers_own_forward_runs(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, plain, (x, _) = net(), net(), data(6)
    _kept = FNGDPreconditioner(model)
    assert set(graph_nodes(model(x))) != set(graph_nodes(plain(x)))
    found, own = call(model, x), call(plain, x)
    assert torch.equal(found, own)
    assert list(graph_nodes(found)) == list(graph_nodes(own))


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
    if base is FSDPModule:  # which is looked through
        again = FNGDPreconditioner(model)
        one_step(model, again, *data(6))
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
    model, optimizer = with_fngd(**first)
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
    _kept = FNGDPreconditioner(model)


def test_detaching_a_second_time_leaves_another_preconditioner_alone() -> None:
    model = net()
    first = FNGDPreconditioner(model)
    detach(model)
    second = FNGDPreconditioner(model, sharing="never")
    first.detach()
    one_step(model, second, *data(6, 3))
    assert second.coverage().missed == {}
    assert torch.isfinite(second.policy.rho).all()


# A forward that somebody puts on the model -----------------------------------------------------------------


def another(model: Net) -> None:
    """As TRL's trainers, which never call the one that was there."""

    def fused(self: Net, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))

    model.forward = MethodType(fused, model)  # type: ignore[method-assign]


def around_it(model: Net) -> None:
    """As Accelerate for mixed precision."""
    model._original_forward = model.forward  # type: ignore[assignment]
    context = torch.autocast("cpu", torch.bfloat16, enabled=False)
    model.forward = MethodType(context(model.forward.__func__), model)  # type: ignore[attr-defined, method-assign]


def partial(model: Net) -> None:
    model.forward = functools.partial(model.forward)  # type: ignore[method-assign]


def another_and_around_it(model: Net) -> None:
    another(model)
    around_it(model)
    partial(model)


def around_it_no_more(model: Net) -> None:
    another(model)
    around_it(model)
    extract_model_from_parallel(model, keep_fp32_wrapper=False)


def there_and_back(model: Net) -> None:
    """As TRL, which sends another method through the wrapper of a distributed model."""
    for _ in range(1100):
        before = model.forward
        model.forward = lambda x: x  # type: ignore[method-assign]
        model.forward = before  # type: ignore[method-assign]


PATCHES = [another, around_it, partial, another_and_around_it, around_it_no_more, there_and_back]


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_forward_that_is_put_on_the_model_is_weighed_and_begins_one_micro_batch(
    patch: Callable[[Net], None], later: bool
) -> None:
    states, gradients = [], []
    for each in (lambda model: None, patch):
        model = net()
        if not later:
            each(model)
        preconditioner = FNGDPreconditioner(model, sharing="replay", coefficient_steps=2, strict=True)
        if later:
            each(model)
        assert list(inspect.signature(model.forward).parameters) == ["x", "sample_ids"]
        for step in range(4):
            one_step(model, preconditioner, *data(6, 3, seed=step))
        gradients.append(gradient(model))
        states.append(digest(preconditioner.state_dict()))
    assert torch.equal(*gradients)
    assert states[0] == states[1]


@pytest.mark.parametrize("patch", [another, another_and_around_it])
def test_the_forward_stays_when_the_model_is_plain_again(patch: Callable[[Net], None]) -> None:
    model, preconditioner = with_engine()
    patch(model)
    wrapped = model.forward.__func__.__wrapped__  # type: ignore[attr-defined]
    copied, (x, y) = copy.deepcopy(model), data(6)
    assert type(copied) is Net
    assert not any(key.startswith("_fngd") for key in vars(copied))
    preconditioner.detach()
    assert type(model) is Net
    assert getattr(model.forward, "__func__", model.forward) is wrapped
    plain = net()
    for each in (plain, copied, model):
        loss(each, x, y).backward()
        if each is not copied or patch is another:  # Accelerate's way is to train the original by the copy
            assert torch.equal(gradient(each), gradient(plain))
        model.zero_grad()


# transformers --------------------------------------------------------------------------------------------


def test_save_pretrained_writes_what_the_plain_model_would(tmp_path) -> None:
    plain, attached = bert(), bert()
    _kept = FNGDPreconditioner(attached)
    for model, folder in ((plain, "plain"), (attached, "attached")):
        model.save_pretrained(tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for name in names:
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = type(plain).from_pretrained(tmp_path / "attached")
    assert type(loaded) is type(plain)
    assert_equal(loaded, plain)


def test_a_transformer_trains_and_generates() -> None:
    model, tokens = gpt2(num_hidden_layers=1), torch.arange(2, 20).view(3, 6)
    plain = model.eval().generate(tokens, max_new_tokens=4, do_sample=False)
    optimizer = FNGD(model, lr=0.0)
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert optimizer.coverage().missed == {}
    assert torch.equal(model.eval().generate(tokens, max_new_tokens=4, do_sample=False), plain)
