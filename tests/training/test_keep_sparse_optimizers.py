"""Zeros under optimizers of every kind: those of torch, wrapped ones, packed states."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from tests.training.gradual_cases import MODES, Network, batch
from torchprune_bayes import GradualPruner, Magnitude, linear, one_shot, prune_global
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError
from torchprune_bayes.methods import bake
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.training import PriorDecay, keep_sparse

LINE_SEARCH: dict[str, Any] = {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.03, amsgrad=True, weight_decay=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.03),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.03),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.03),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, **LINE_SEARCH),
    "LBFGS without a search": lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=2),
}


def trained(name: str, mode: str, clip: float) -> tuple[Network, float, list[float]]:
    """Eighteen clipped updates with a pruning in their midst; the norms that clipping saw."""
    torch.manual_seed(0)
    model, (x, y) = Network(), batch(0, 64)
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = linear(0.5, begin=4, end=8, every=4, initial=0.25)
    pruner = GradualPruner(model, "magnitude", schedule, optimizer=optimizer, mode=mode)
    norms = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        return loss

    for _ in range(18):
        optimizer.step(closure)  # type: ignore[arg-type]
        pruner.step()
    return model, cross_entropy(model(x), y).item(), norms


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_modes_train_alike(name: str) -> None:
    """The gradient through a mask is what a gradient of a pruned entry has to be."""
    clip = 1e6 if name.startswith("LBFGS") else 0.1
    found, expected = (trained(name, mode, clip) for mode in MODES)
    assert len(found[2]) == len(expected[2])
    assert found[2] == pytest.approx(expected[2], rel=1e-3, abs=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-3)
    for key, value in found[0].weights().items():
        torch.testing.assert_close(value, expected[0].weights()[key], rtol=1e-3, atol=1e-4)
        assert int((value == 0).sum()) == int((expected[0].weights()[key] == 0).sum()) > 0


def test_gradients_are_zero_as_soon_as_they_come_into_being() -> None:
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = torch.rand(3, 4) < 0.5
    layer(torch.randn(5, 4)).square().sum().backward()  # there already
    handle = keep_sparse(optimizer, {layer.weight: mask})
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad != 0, mask)
    for _ in range(2):  # adding up
        layer(torch.randn(5, 4)).square().sum().backward()
        assert torch.equal(layer.weight.grad != 0, mask)
    (found,) = torch.autograd.grad(layer(torch.randn(5, 4)).square().sum(), [layer.weight])
    assert torch.equal(found != 0, mask)
    layer.weight.grad = torch.ones(3, 4)  # written by hand
    seen: list[Tensor] = []
    step = optimizer.register_step_pre_hook(
        lambda *_: seen.append(layer.weight.grad.clone())  # type: ignore[union-attr]
    )
    optimizer.step()
    assert torch.equal(seen[0] != 0, mask)
    step.remove()
    handle.remove()
    layer(torch.randn(5, 4)).square().sum().backward()
    assert bool(layer.weight.grad[~mask].any())


def test_models_are_copied_and_saved_as_ever() -> None:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GradualPruner(model, "magnitude", one_shot(0.5), optimizer=optimizer).step()
    copied = copy.deepcopy(model)
    assert not copied.first.weight._backward_hooks
    torch.save(model, io.BytesIO())
    torch.multiprocessing.reductions.reduce_tensor(model.first.weight)


class Codes(Tensor):
    """What a moment packed in 8 bits looks like: shaped and typed as a float, and no float."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Codes:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, *_: Any, **__: Any
    ) -> Any:
        raise NotImplementedError(f"no {function} for codes")


class Packed(torch.optim.SGD):
    """Keeps codes, a packed moment, a preconditioner and a moment beside one another."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {
                        "state1": torch.full(p.shape, 7, dtype=torch.uint8),
                        "exp_avg_sq": Codes(torch.full(p.shape, 7, dtype=torch.uint8)),
                        "exp_avg": torch.ones_like(p),
                        "precond_0": torch.ones_like(p),
                        "max_exp_avg_sq": torch.full(p.shape, 7, dtype=torch.uint8),
                    }
        return super().step(closure)


def test_what_is_no_plain_moment_is_left_alone() -> None:
    layer = nn.Linear(6, 6)
    optimizer = Packed(layer.parameters(), lr=0.1, weight_decay=0.1)
    pruner = GradualPruner(layer, "magnitude", one_shot(0.5, at=2), optimizer=optimizer)
    for _ in range(4):
        layer(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        pruner.step()
        state = optimizer.state[layer.weight]
        assert bool((state["state1"] == 7).all() and (state["max_exp_avg_sq"] == 7).all())
        assert bool((state["exp_avg_sq"].codes == 7).all() and (state["precond_0"] == 1).all())
    assert pruner.sparsity == 0.5
    assert torch.equal(state["exp_avg"] == 0, layer.weight == 0)


@pytest.mark.parametrize("mode", MODES)
def test_accelerates_wrapper_is_looked_through(mode: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(8, 3)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    pruner = GradualPruner(model, "magnitude", one_shot(0.5, at=2), optimizer=optimizer, mode=mode)
    for _ in range(4):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(4, 8)).square().sum())
        optimizer.step()
        pruner.step()
    weight = ParameterSpace(model).values()["weight"]
    assert int((weight == 0).sum()) == 12
    moment = optimizer.optimizer.state[ParameterSpace(model)[0].leaf]["exp_avg"]
    assert torch.equal(moment == 0, weight == 0)


class Detached(Optimizer):
    """An optimizer in name: nothing of it takes a hook, and nothing is inside."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]


def lookahead(parameters: Any) -> Any:
    """Has a place for hooks, and a step that runs none."""
    return timm.optim.Lookahead(torch.optim.SGD(parameters, lr=0.1))


@pytest.mark.parametrize("make", [Detached, lambda p: object(), lookahead])
def test_what_takes_no_hooks_is_refused_when_the_pruner_is_made(make: Any) -> None:
    model = Network()
    optimizer: Any = make(model.parameters())
    with pytest.raises(ArgumentTypeError, match="takes no hooks"):
        GradualPruner(model, "magnitude", one_shot(0.5), optimizer=optimizer)
    with pytest.raises(ArgumentTypeError, match="takes no hooks"):
        keep_sparse(optimizer, {})
    with pytest.raises(ArgumentTypeError, match="takes no hooks"):
        PriorDecay(optimizer, {}, factor=1.0)


def test_masks_go_by_name_with_the_model() -> None:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    decision = prune_global(ParameterSpace(model).pairs(), "magnitude", amount=0.5)
    bake(model)
    names = dict.fromkeys(Magnitude(0.5).decide(ParameterSpace(model)).masks)
    masks = dict(zip(names, decision.masks.values(), strict=True))
    with pytest.raises(ArgumentTypeError, match=r"pass the model .* `model=`"):
        keep_sparse(optimizer, masks)
    with pytest.raises(AlignmentError, match=r"got 'first\.bulk'"):
        keep_sparse(optimizer, {"first.bulk": masks["first.weight"]}, model=model)
    handle = keep_sparse(optimizer, masks, model=nn.DataParallel(model))
    model(batch(0)[0]).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v != 0, masks[name]) for name, v in model.weights().items())
    handle.remove()
