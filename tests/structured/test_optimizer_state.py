"""Survivors of a shrunk model move exactly as they do in the masked model trained beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchprune_bayes.errors import AlignmentError, ArgumentTypeError, ParameterError
from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
from torchprune_bayes.structured.optimizer_state import slice_ema, slice_optimizer
from torchprune_bayes.structured.slicing import ShrinkPlan, apply_plan, plan_of, zero_units

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(
        groups, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True
    ),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02, weight_decay=1e-2),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.02, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1, foreach=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)
    ).double()


def groups_of() -> list[UnitGroup]:
    first, second = torch.arange(6).view(6, 1), torch.arange(4).view(4, 1)
    return [
        UnitGroup(
            "0",
            "channel",
            6,
            (
                UnitSlice("0.weight", 0, first, "producer"),
                UnitSlice("0.bias", 0, first, "producer"),
                UnitSlice("2.weight", 1, first, "consumer"),
            ),
        ),
        UnitGroup(
            "2",
            "channel",
            4,
            (
                UnitSlice("2.weight", 0, second, "producer"),
                UnitSlice("4.weight", 1, second, "consumer"),
            ),
        ),
    ]


KEPT = {"0": torch.tensor([0, 2, 5]), "2": torch.tensor([1, 3])}


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.01}]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    after: Callable[[], object] = lambda: None,
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
        after()


def shrink_with(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[ShrinkPlan, Mapping[str, tuple[nn.Parameter, nn.Parameter]]]:
    plan = plan_of(model, groups_of(), KEPT)
    change = apply_plan(model, plan)
    slice_optimizer(optimizer, plan, change.parameters)
    return plan, change.parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory_is_that_of_the_masked_twin(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](parameter_groups(model))
    train(model, optimizer, 5)
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS[name](parameter_groups(twin))
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan, _ = shrink_with(model, optimizer)
    zero_units(twin, plan)
    train(model, optimizer, 10)
    train(twin, twin_optimizer, 10, lambda: zero_units(twin, plan))
    before = network()
    for (parameter_name, new), old in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(new.data, plan.cut(parameter_name, old.data), rtol=0, atol=1e-13)
        start = plan.cut(parameter_name, before.get_parameter(parameter_name).data)
        assert not torch.allclose(new.data, start)  # it did move


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
def test_without_the_state_the_trajectory_differs(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](parameter_groups(model))
    train(model, optimizer, 5)
    shrink_with(model, optimizer)
    fresh = copy.deepcopy(model)
    train(model, optimizer, 1)
    train(fresh, OPTIMIZERS[name](parameter_groups(fresh)), 1)
    pairs = zip(model.parameters(), fresh.parameters(), strict=True)
    assert not any(torch.allclose(new, old, atol=1e-5) for new, old in pairs)


def test_groups_and_state_keep_their_identity_and_order() -> None:
    model = network()
    optimizer = OPTIMIZERS["adamw"](parameter_groups(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 2)
    scheduler.step()
    groups, lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    state, untouched = optimizer.state, model[4].bias
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    keys = list(optimizer.state)
    _, parameters = shrink_with(model, optimizer)
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert [group["params"] for group in groups] == lists
    assert all(group["params"] is each for group, each in zip(groups, lists, strict=True))
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == settings
    expected = [[id(p) for p in group["params"]] for group in parameter_groups(model)]
    assert [[id(p) for p in group["params"]] for group in groups] == expected
    new_of = {id(old): new for old, new in parameters.values()}
    assert [id(new_of.get(id(key), key)) for key in keys] == [id(key) for key in state]
    assert any(p is untouched for p in groups[1]["params"])
    assert all(int(state[p]["step"]) == 2 for p in model.parameters())
    scheduler.step()
    assert groups[0]["lr"] == pytest.approx(0.02 / 4)


def test_state_dict_loads_into_an_optimizer_of_the_shrunk_model() -> None:
    model = network()
    optimizer = OPTIMIZERS["adam"](parameter_groups(model))
    train(model, optimizer, 3)
    shrink_with(model, optimizer)
    again = copy.deepcopy(model)
    other = OPTIMIZERS["adam"](parameter_groups(again))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)
    train(again, other, 2)
    for new, old in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(new, old)


def test_parameters_of_other_models_and_missing_ones_are_passed_over() -> None:
    model, other = network(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*other.parameters(), *model[2].parameters()], lr=0.1, momentum=0.9)
    shrink_with(model, optimizer)
    held = optimizer.param_groups[0]["params"]
    assert [id(p) for p in held] == [id(other.weight), id(other.bias), id(model[2].weight)]


class Factored(torch.optim.SGD):
    """Keeps one number for each row, as Adafactor does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["row"] = (
                    parameter.detach().square().flatten(1).mean(1) if parameter.dim() > 1 else 0
                )


def _lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer


def _factored(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = Factored(model.parameters(), lr=0.1)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_lbfgs, "LBFGS, whose history"),
        (_factored, r"`row` in the optimizer's state of `0.weight`"),
    ],
)
def test_state_that_cannot_be_cut_is_refused_untouched(
    build: Callable[[nn.Module], torch.optim.Optimizer], message: str
) -> None:
    model = network()
    optimizer = build(model)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    keys = [id(p) for p in optimizer.state]
    plan = plan_of(model, groups_of(), KEPT)
    change = apply_plan(model, plan)
    with pytest.raises(ParameterError, match=message):
        slice_optimizer(optimizer, plan, change.parameters)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    assert [id(p) for p in optimizer.state] == keys


def test_new_parameter_of_another_shape_is_refused() -> None:
    model = network()
    optimizer = OPTIMIZERS["adam"](parameter_groups(model))
    plan = plan_of(model, groups_of(), KEPT)
    old = model[0].weight
    with pytest.raises(AlignmentError, match=r"new `0.weight`.*\(6, 5\), got \(2, 2\)"):
        slice_optimizer(optimizer, plan, {"0.weight": (old, nn.Parameter(torch.zeros(2, 2)))})  # type: ignore[dict-item]
    assert optimizer.param_groups[0]["params"][0] is old


SCALED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.0, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.0, momentum=0.5, centered=True, eps=1e-16),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.0),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.0),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.0),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.0, t0=0),
}
"""Optimizers that let the parameters be, so that all gradients are of one place."""


def rescaled_cut() -> tuple[ShrinkPlan, nn.Parameter, nn.Parameter]:
    """A plan that keeps two rows of three and halves one of them; a parameter before and after."""
    factors = {"w": {0: torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)}}
    plan = ShrinkPlan({"w": {0: torch.tensor([0, 2])}}, {"w": (3, 4)}, {}, factors)
    old = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    return plan, old, nn.Parameter(plan.rescaled("w", plan.cut("w", old.detach())))


@pytest.mark.parametrize("name", SCALED)
def test_state_of_a_rescaled_parameter_is_that_of_its_own_gradients(name: str) -> None:
    plan, old, new = rescaled_cut()
    twin = nn.Parameter(new.detach().clone())
    optimizer, twin_optimizer = SCALED[name]([old]), SCALED[name]([twin])
    for _ in range(3):
        old.grad = torch.randn_like(old)
        factors = torch.tensor([[0.5], [1.0]], dtype=torch.float64)  # loss of w / c: gradient / c
        twin.grad = old.grad[[0, 2]] / factors
        optimizer.step()
        twin_optimizer.step()
    slice_optimizer(optimizer, plan, {"w": (old, new)})
    found, wanted = optimizer.state[new], twin_optimizer.state[twin]
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(torch.as_tensor(found[key]), torch.as_tensor(value)), key


def test_unknown_state_of_a_rescaled_parameter_is_refused() -> None:
    plan, old, new = rescaled_cut()
    optimizer = torch.optim.SGD([old], lr=0.1)
    optimizer.state[old]["whiteness"] = torch.ones_like(old)
    with pytest.raises(ParameterError, match="got `whiteness`: make the optimizer anew"):
        slice_optimizer(optimizer, plan, {"w": (old, new)})
    assert optimizer.param_groups[0]["params"][0] is old


EMAS: dict[str, Callable[[nn.Module], Any]] = {
    "timm": lambda model: ModelEmaV3(model, decay=0.5),
    "torch": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
}


def advance(ema: Any, model: nn.Module) -> None:
    (ema.update if isinstance(ema, ModelEmaV3) else ema.update_parameters)(model)


@pytest.mark.parametrize("kind", EMAS)
def test_averages_of_survivors_go_on_as_in_the_masked_twin(kind: str) -> None:
    model = network()
    ema = EMAS[kind](model)
    optimizer = OPTIMIZERS["adam"](parameter_groups(model))
    train(model, optimizer, 4, lambda: advance(ema, model))
    twin, twin_ema = copy.deepcopy(model), copy.deepcopy(ema)
    twin_optimizer = OPTIMIZERS["adam"](parameter_groups(twin))
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan, _ = shrink_with(model, optimizer)
    slice_ema(ema, plan)
    zero_units(twin, plan)
    zero_units(twin_ema.module, plan)

    def mask_and_average() -> None:
        zero_units(twin, plan)
        advance(twin_ema, twin)

    train(model, optimizer, 4, lambda: advance(ema, model))
    train(twin, twin_optimizer, 4, mask_and_average)
    torch.testing.assert_close(ema.module(X), twin_ema.module(X), rtol=0, atol=1e-13)
    assert not torch.allclose(ema.module(X), model(X))
    for name, tensor in ema.module.named_parameters():
        assert tensor.shape == model.get_parameter(name).shape


def test_plain_copies_are_cut_and_the_change_can_be_undone() -> None:
    model = network()
    shadow = copy.deepcopy(model)
    before = shadow(X)
    plan = plan_of(model, groups_of(), KEPT)
    change = slice_ema(shadow, plan)
    assert shadow[0].weight.shape == (3, 5)
    change.undo()
    assert torch.equal(shadow(X), before)


def test_ema_that_is_no_module_is_refused() -> None:
    plan = plan_of(network(), groups_of(), KEPT)
    with pytest.raises(ArgumentTypeError, match=r"`ema` to be an nn\.Module, got list"):
        slice_ema([torch.zeros(2)], plan)  # type: ignore[arg-type]
