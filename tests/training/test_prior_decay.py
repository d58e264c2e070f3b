from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.training import PriorDecay

FACTOR = 0.05
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def _precisions(model: Any) -> dict[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        model[0].weight: torch.rand(6, 4, generator=generator).double() * 3,
        model[2].weight: torch.rand(2, 1, generator=generator).double() * 3,
        model[0].bias: torch.tensor(2.0).double(),
    }


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(16, 2, generator=generator, dtype=torch.float64)


def _penalty(precisions: dict[Tensor, Tensor]) -> Tensor:
    parts = [(precision * weight.square()).sum() for weight, precision in precisions.items()]
    return FACTOR / 2 * torch.stack(parts).sum()


def _assert_same(first: nn.Module, second: nn.Module) -> None:
    for ours, expected in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_steps_are_those_of_a_penalty_in_the_loss(name: str, accumulation: int) -> None:
    ours, reference = _model(), _model()
    x, y = _data()
    optimizer, other = (OPTIMIZERS[name](m.parameters()) for m in (ours, reference))
    PriorDecay(optimizer, _precisions(ours), FACTOR)
    theirs = _precisions(reference)
    for _ in range(20):
        optimizer.zero_grad()
        for inputs, targets in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            (mse_loss(ours(inputs), targets) / accumulation).backward()
        optimizer.step()
        other.zero_grad()
        (mse_loss(reference(x), y) + _penalty(theirs)).backward()
        other.step()
    _assert_same(ours, reference)


def test_closures_see_the_prior() -> None:
    ours, reference = _model(), _model()
    x, y = _data()
    # Few iterations: differences of rounding grow by orders of magnitude with each of many.
    optimizer, other = (
        torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=5) for m in (ours, reference)
    )
    PriorDecay(optimizer, _precisions(ours), FACTOR)
    theirs = _precisions(reference)

    def closure(model: nn.Module, optimizer: Any, penalty: Callable[[], Any]) -> Tensor:
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        (loss + penalty()).backward()
        return loss

    for _ in range(3):
        optimizer.step(lambda: closure(ours, optimizer, lambda: 0.0))
        other.step(closure=lambda: closure(reference, other, lambda: _penalty(theirs)))
    _assert_same(ours, reference)


def test_works_after_loss_scaling_and_clipping() -> None:
    ours, reference = (_model().float() for _ in range(2))
    x, y = (part.float() for part in _data())
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (ours, reference))
    PriorDecay(optimizer, {p: d.float() for p, d in _precisions(ours).items()}, FACTOR)
    theirs = {p: d.float() for p, d in _precisions(reference).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(20):
        optimizer.zero_grad()
        scaler.scale(mse_loss(ours(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        other.zero_grad()
        mse_loss(reference(x), y).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        _penalty(theirs).backward()
        other.step()
    for mine, expected in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_a_step_with_overflow_leaves_the_weights() -> None:
    model = _model().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    PriorDecay(optimizer, {p: d.float() for p, d in _precisions(model).items()}, FACTOR)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.full((1, 4), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    assert all(map(torch.equal, before, model.parameters()))


def test_decoupled_decay_is_that_of_adamw() -> None:
    ours, reference = _model(), _model()
    x, y = _data()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0.0)
    other = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=FACTOR * 2.0)
    precisions = {p: torch.tensor(2.0).double() for p in ours.parameters()}
    PriorDecay(optimizer, precisions, FACTOR, decoupled=True)
    for _ in range(20):
        for model, one in ((ours, optimizer), (reference, other)):
            one.zero_grad()
            mse_loss(model(x), y).backward()
            one.step()
    _assert_same(ours, reference)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_prior_too_strong_for_the_step_sets_weights_to_zero(decoupled: bool) -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    PriorDecay(
        optimizer, {model[0].weight: torch.tensor(1e8).double()}, FACTOR, decoupled=decoupled
    )
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    assert float(model[0].weight.detach().abs().max()) < 1e-12


def test_leaves_what_has_no_gradient_or_no_prior() -> None:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    decay = PriorDecay(optimizer, {model[0].weight: torch.tensor(1.0).double()}, FACTOR)
    before = [p.detach().clone() for p in model.parameters()]
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    decay.remove()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_half_precision_gradients() -> None:
    layer = nn.Linear(2, 1, bias=False).bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    PriorDecay(optimizer, {layer.weight: torch.ones(1, 2)}, 1.0)
    nn.init.ones_(layer.weight)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert layer.weight.tolist() == [[0.5, 0.5]]


def test_refuses_other_weight_decay_and_strangers() -> None:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    with pytest.raises(ArgumentError, match=r"weight_decay=0 .* got 0\.01"):
        PriorDecay(optimizer, _precisions(model), FACTOR)
    with pytest.raises(AlignmentError, match="parameters of the optimizer"):
        PriorDecay(torch.optim.SGD(_model().parameters(), lr=1.0), _precisions(model), FACTOR)
    with pytest.raises(ArgumentError, match="factor"):
        PriorDecay(torch.optim.SGD(model.parameters(), lr=1.0), _precisions(model), 0.0)
    others = torch.optim.SGD([{"params": [model[2].bias], "weight_decay": 0.1}], lr=1.0)
    others.add_param_group({"params": [model[0].weight]})
    PriorDecay(others, {model[0].weight: torch.ones(())}, FACTOR)
