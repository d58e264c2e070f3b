"""SpaM's steps and states are taken whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.interruptions import interrupted_everywhere
from tests.training.gradual_cases import Network, batch
from torchprune_bayes import Calibration, linear
from torchprune_bayes.errors import TorchPruneBayesError
from torchprune_bayes.training import SpaM

CHANGING = {"_take_over", "_set_prior", "prune", "hold", "keep_sparse", "hold_zeros", "set_zero"}


def spam() -> tuple[Network, torch.optim.Optimizer, SpaM]:
    """After three epochs, with a pruning; the fourth updates and prunes."""
    torch.manual_seed(0)
    model, (x, y) = Network(), batch(0, 24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"every": 2, "patience": 3, "schedule": linear(0.5, 1, 4, every=1)}
    training = SpaM(optimizer, Calibration(model, [(x, y)], cross_entropy), **options)
    for epoch in range(4):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if epoch < 3:
            training.step()
    return model, optimizer, training


def everything(found: tuple[Network, torch.optim.Optimizer, SpaM]) -> list[Any]:
    model, optimizer, training = found
    moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    precisions = list(training._decay.precisions.values())
    state = training.state_dict()
    masks, best = list(state["masks"].values()), state["best"]
    values = [v.detach().clone() for v in (*model.parameters(), *moments, *precisions, *masks)]
    hooks = [len(p._backward_hooks or ()) for p in model.parameters()]
    steps = [len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)]
    plain = [state["step"], len(state["history"]), training._decay.factor, hooks, steps]
    return [*plain, None if best is None else best["step"], *values]


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def test_an_epoch_that_fails_anywhere_changes_nothing() -> None:
    def prepare() -> tuple[Callable[[], Any], Any]:
        found = spam()
        return found[2].step, (found, everything(found))

    for found, before in interrupted_everywhere(prepare, CHANGING, stride=4):
        assert same(before, everything(found))


@pytest.mark.parametrize("restore", [True, False])
def test_going_back_that_fails_anywhere_changes_nothing(restore: bool) -> None:
    other = spam()[2]
    other.step()
    state = other.state_dict()

    def prepare() -> tuple[Callable[[], Any], Any]:
        found = spam()
        training = found[2]
        run = training.restore_best if restore else lambda: training.load_state_dict(state)
        return run, (found, everything(found))

    for found, before in interrupted_everywhere(prepare, CHANGING, stride=3):
        assert same(before, everything(found))


@pytest.mark.parametrize(
    "change",
    [{"step": "1"}, {"history": 3}, {"masks": {"first.weight": torch.ones(3)}}, {"masks": 1}],
)
def test_what_is_no_state_is_refused_in_a_sentence(change: dict[str, Any]) -> None:
    found = spam()
    before = everything(found)
    for state in (None, {}, found[2].state_dict() | change):
        with pytest.raises(TorchPruneBayesError, match="Expected"):
            found[2].load_state_dict(state)  # type: ignore[arg-type]
    assert same(before, everything(found))
