"""A pruner's step is made whole or not at all, and so is taking up a state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.interruptions import interrupted_everywhere
from tests.training.gradual_cases import MODES, Network, Run, batch, calibration_for, run_of
from torchprune_bayes import Calibration, GradualPruner, WoodFisher, cubic, linear
from torchprune_bayes.costs import flops_per_weight
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    TorchPruneBayesError,
)
from torchprune_bayes.training import IterativeMagnitudePruning

CHANGING = {
    "_commit",
    "_end_decay",
    "end_weight_decay",
    "_hold",
    "_restore_zeros",
    "keep_sparse",
    "hold_zeros",
    "hold_gradients",
    "set_zero",
    "_zero_gradient",
    "_forget_directions",
    "_hold_gradient",
    "hold_gradients_of",
    "write_updates",
    "apply_decision",
    "_set_mask",
    "_rewind",
}
SCHEDULE = linear(0.5, begin=2, end=4, every=2, initial=0.25)


def everything(run: Run) -> list[Any]:
    """All that a failed step has to leave as it was, compared by value."""
    tensors = [*run.model.parameters(), *run.model.buffers()]
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    moments = [v for s in run.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    hooks = [len(p._backward_hooks or ()) for p in run.model.parameters()]
    sites = [sorted(module._forward_pre_hooks) for module in run.model.modules()]
    registered = (run.optimizer._optimizer_step_pre_hooks, run.optimizer._optimizer_step_post_hooks)
    steps = [len(hooked) for hooked in registered]
    steps += [group["weight_decay"] for group in run.optimizer.param_groups]
    names = [name for name, _ in run.model.named_parameters()]
    state = run.pruner.state_dict()
    plain = [state["step"], copy.deepcopy(state["history"]), hooks, sites, steps, names]
    values = [
        t.detach().clone() for t in (*tensors, *gradients, *moments, *state["masks"].values())
    ]
    return [*plain, *values, torch.get_rng_state()]


def same(first: list[Any], second: list[Any]) -> bool:
    if len(first) != len(second):
        return False
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["magnitude", WoodFisher])
def test_a_step_that_fails_anywhere_changes_nothing(mode: str, method: Any) -> None:
    options: dict[str, Any] = {} if method == "magnitude" else {"damping": 0.1, "update_scale": 1.0}

    def prepare() -> tuple[Callable[[], Any], tuple[Run, list[Any]]]:
        run = run_of(method, SCHEDULE, mode=mode, decay_after=False, **options)
        run.train(0, 3)  # pruned once; the next step prunes again
        cross_entropy(run.model(batch(9)[0]), batch(9)[1]).backward()
        return run.pruner.step, (run, everything(run))

    stride = 1 if method == "magnitude" else 9
    for run, before in interrupted_everywhere(prepare, CHANGING, stride):
        assert same(before, everything(run))
        run.train(3, 4)
        assert run.pruner.sparsity == 0.5


@pytest.mark.parametrize("mode", MODES)
def test_taking_up_a_state_that_fails_anywhere_changes_nothing(mode: str) -> None:
    other = run_of(schedule=SCHEDULE, mode=mode)
    other.train(0, 4)
    state = other.pruner.state_dict()

    def prepare() -> tuple[Callable[[], Any], tuple[Run, list[Any]]]:
        run = run_of(schedule=SCHEDULE, mode=mode)
        run.train(0, 1)
        return (lambda: run.pruner.load_state_dict(state)), (run, everything(run))

    for run, before in interrupted_everywhere(prepare, CHANGING):
        assert same(before, everything(run))


def test_rewinding_that_fails_anywhere_changes_nothing() -> None:
    def prepare() -> tuple[Callable[[], Any], Any]:
        torch.manual_seed(0)
        model = Network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        pruner = IterativeMagnitudePruning(model, linear(0.5, 0, 1), optimizer=optimizer)
        pruner.remember()
        model(batch(0)[0]).sum().backward()
        optimizer.step()
        run = Run(model, optimizer, pruner._pruner)
        return pruner.prune_and_rewind, (run, everything(run))

    for run, before in interrupted_everywhere(prepare, CHANGING - {"_restore_zeros"}):
        assert same(before, everything(run))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {"step": 1},
        {"step": "1", "history": [], "masks": {}},
        {"step": 1, "history": 3, "masks": {}},
        {"step": 1, "history": [3], "masks": {}},
        {"step": 1, "history": [], "masks": []},
        {"step": 1, "history": [], "masks": {"first.weight": [1, 0]}},
        {"step": 1, "history": [], "masks": {"first.weight": torch.rand(8, 6)}},
        {"step": 1, "history": [], "masks": {"first.weight": torch.ones(8)}},
    ],
)
def test_what_is_no_state_is_refused_in_a_sentence(mode: str, state: Any) -> None:
    run = run_of(schedule=SCHEDULE, mode=mode)
    run.train(0, 3)
    before = everything(run)
    with pytest.raises(TorchPruneBayesError, match="Expected"):
        run.pruner.load_state_dict(state)
    assert same(before, everything(run))


class Convolutions(nn.Module):
    """Weights of 50, 18 and 2 FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()
        )
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_flop_target_is_come_to_along_the_schedule() -> None:
    model = Convolutions()
    x, y = torch.randn(32, 1, 5, 5), torch.randint(3, (32,))
    calibration = Calibration(model, [(x, y)], cross_entropy)
    costs = flops_per_weight(calibration)
    assert sorted(set(costs.values())) == [2.0, 18.0, 50.0]
    schedule = cubic(0.8, begin=1, end=4)
    pruner = GradualPruner(
        None, "woodfisher", schedule, calibration=calibration, flops_target=0.3, damping=0.1
    )
    for step in range(1, 6):
        assert not pruner.finished or step == 5
        pruner.step()
        masks = pruner.masks
        dense = sum(costs[name] * mask.numel() for name, mask in masks.items())
        kept = sum(costs[name] * int(mask.sum()) for name, mask in masks.items())
        budget = (1 - 0.7 * schedule(step) / 0.8) * dense
        assert budget - max(costs.values()) < kept <= budget + 1e-6
    assert pruner.finished
    assert [event["step"] for event in pruner.history] == [2, 3, 4]


def test_flop_targets_that_cannot_be_are_refused_at_once() -> None:
    model = Network()
    schedule = linear(0.5, 1, 2)
    with pytest.raises(ArgumentError, match="a method that takes `flops_target`"):
        GradualPruner(model, "magnitude", schedule, flops_target=0.5)
    options: dict[str, Any] = {"calibration": calibration_for(model)}
    with pytest.raises(ArgumentError, match="flops_target"):
        GradualPruner(model, "woodfisher", schedule, flops_target=1.5, **options)
    each = {"first.weight": schedule, "last.weight": linear(0.6, 1, 2)}
    with pytest.raises(ArgumentError, match="one schedule for all"):
        GradualPruner(model, "woodfisher", each, flops_target=0.5, **options)


def test_weight_decay_can_end_with_the_schedule() -> None:
    torch.manual_seed(0)
    model = Network()
    weights = [model.first.weight, model.last.weight]
    biases = [model.first.bias, model.last.bias]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(ArgumentTypeError, match="decay_after=False"):
        GradualPruner(model, "magnitude", SCHEDULE, decay_after=False)
    options: dict[str, Any] = {"optimizer": optimizer, "decay_after": False}
    pruner = GradualPruner(model, "magnitude", SCHEDULE, **options)
    found = []
    for _ in range(6):
        pruner.step()
        found.append([group["weight_decay"] for group in optimizer.param_groups])
    assert found == [[0.1, 0.2]] * 3 + [[0.0, 0.2]] * 3
    fresh = Network()
    groups = [{"params": [fresh.first.weight, fresh.last.weight], "weight_decay": 0.1}]
    options["optimizer"] = torch.optim.SGD(groups, lr=0.1)
    again = GradualPruner(fresh, "magnitude", SCHEDULE, **options)
    again.load_state_dict(pruner.state_dict())
    assert options["optimizer"].param_groups[0]["weight_decay"] == 0.0


def test_a_pruner_lets_go_of_the_model() -> None:
    run = run_of(schedule=SCHEDULE)
    run.train(0, 4)
    run.pruner.remove()
    run.model.zero_grad()
    cross_entropy(run.model(batch(9)[0]), batch(9)[1]).backward()
    weight = run.model.first.weight
    assert weight.grad is not None
    assert bool(weight.grad[weight == 0].any())
    with pytest.raises(AlignmentError, match="parameters of the optimizer"):
        GradualPruner(Network(), "magnitude", SCHEDULE, optimizer=run.optimizer)


def test_without_an_optimizer_gradients_go_free_with_the_pruner() -> None:
    model = Network()
    pruner = GradualPruner(model, "magnitude", linear(0.5, 0, 1))
    pruner.step()
    zeros = model.first.weight == 0
    model(batch(0)[0]).sum().backward()
    assert model.first.weight.grad is not None
    assert not model.first.weight.grad[zeros].any()
    del pruner
    model(batch(0)[0]).sum().backward()
    assert model.first.weight.grad[zeros].any()
