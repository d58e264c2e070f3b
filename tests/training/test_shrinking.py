"""Shrinking along a schedule in a loop of one's own, and the FLOPs of the training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration, halving
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError, ParameterError
from torchprune_bayes.schedules import linear, one_shot
from torchprune_bayes.structured import L1FilterImportance, SNAPitImportance
from torchprune_bayes.training import GradualShrinking, TrainingFlops

X = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)),
    )


def snap_it(model: nn.Module) -> SNAPitImportance:
    return SNAPitImportance(Calibration(model, [(X, Y)], cross_entropy))


def an_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def test_snap_it_during_training_follows_the_published_path_and_keeps_the_momentum():
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = halving(0.75, begin=2, every=2, steps=1)
    shrinking = GradualShrinking(
        model, snap_it, schedule, example_inputs=X[:2], optimizer=optimizer, target="channels"
    )
    units = []
    for _ in range(7):
        an_epoch(model, optimizer)
        shrinking.step()
        units.append(model[0].out_channels + model[3].out_channels)
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(
            map(id, model.parameters())
        )
        for parameter in model.parameters():
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert units == [24, 12, 12, 9, 9, 6, 6]
    assert shrinking.finished
    assert shrinking.left == pytest.approx(0.25)
    assert [report.units.after for report in shrinking.reports] == [12, 9, 6]
    assert model.training


def test_a_failing_cut_changes_nothing_and_is_not_counted():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fails = [True]

    def importance(model: nn.Module) -> L1FilterImportance:
        if fails.pop() if fails else False:
            raise RuntimeError("no score")
        return L1FilterImportance()

    shrinking = GradualShrinking(
        model, importance, one_shot(0.5, at=1), example_inputs=X[:2], optimizer=optimizer
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no score"):
        shrinking.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert not shrinking.finished
    assert shrinking.step() is not None


def test_going_on_from_a_state_is_as_if_there_was_no_break():
    def made(model: nn.Module) -> GradualShrinking:
        path = linear(0.6, begin=1, end=3)
        return GradualShrinking(model, lambda _: L1FilterImportance(), path, example_inputs=X[:2])

    whole, broken = net(), net()
    once, first = made(whole), made(broken)
    for _ in range(3):
        once.step()
    first.step()
    first.step()
    second = made(broken)
    second.load_state_dict(first.state_dict())
    second.step()
    assert [p.shape for p in whole.parameters()] == [p.shape for p in broken.parameters()]
    assert second.left == pytest.approx(once.left)


def test_an_averaged_copy_is_cut_along():
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    GradualShrinking(
        *(model, lambda _: L1FilterImportance(), one_shot(0.5, at=0)),
        example_inputs=X[:2],
        ema=average,
    ).step()
    assert average(X).shape == model(X).shape
    shapes = [parameter.shape for parameter in model.parameters()]
    assert [parameter.shape for parameter in average.module.parameters()] == shapes
    assert shapes != [parameter.shape for parameter in net().parameters()]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"schedule": 0.5}, ArgumentTypeError, "Expected a Schedule, got float"),
        ({"importance": None}, ArgumentTypeError, "Expected a function of the model"),
        ({"sparsity": 0.5}, ArgumentError, "Expected the sparsity in the schedule"),
        ({"model": nn.Linear(64, 3)}, ArgumentError, "unit"),
    ],
)
def test_wrong_arguments_are_one_sentence(changes, error, message):
    given = {
        "model": net(),
        "importance": lambda _: L1FilterImportance(),
        "schedule": one_shot(0.5),
        "example_inputs": X[:2].flatten(1) if "model" in changes else X[:2],
    }
    with pytest.raises(error, match=message):
        GradualShrinking(**{**given, **changes})


@pytest.mark.parametrize(
    "state", [None, {"step": 1}, {"step": -1, "left": 1.0}, {"step": 1, "left": 0.0}]
)
def test_a_state_of_something_else_is_refused(state):
    shrinking = GradualShrinking(
        net(), lambda _: L1FilterImportance(), one_shot(0.5, at=9), example_inputs=X[:2]
    )
    with pytest.raises(ArgumentError):
        shrinking.load_state_dict(state)


def test_a_masked_model_is_refused_before_it_trains():
    model = net()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ParameterError):
        GradualShrinking(model, lambda _: L1FilterImportance(), one_shot(0.5), example_inputs=X[:2])


def test_flops_of_a_training_are_those_of_each_size_by_hand():
    model = net()
    flops = TrainingFlops(X[:2])
    # Two for each multiply-add: 36 positions of 9·1·12, 16 of 9·12·12, and 12·3.
    assert flops.add(model, samples=24) == 24 * 2 * (36 * 9 * 12 + 16 * 9 * 144 + 36)
    GradualShrinking(
        *(model, lambda _: L1FilterImportance(), one_shot(0.5, at=0)),
        example_inputs=X[:2],
        target="channels",
    ).step()
    a, b = model[0].out_channels, model[3].out_channels
    assert flops.add(model, samples=8) == 8 * 2 * (36 * 9 * a + 16 * 9 * a * b + 3 * b)
    assert flops.total == 24 * 2 * 24660 + 8 * 2 * (36 * 9 * a + 16 * 9 * a * b + 3 * b)
    assert TrainingFlops(X[:2], passes=3).add(net(), 1) == 3 * TrainingFlops(X[:1]).add(net(), 1)


def test_counting_leaves_the_model_as_it_is():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    TrainingFlops(X[:2]).add(model, 1)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.training
    with pytest.raises(ArgumentError, match="Expected a tensor with samples"):
        TrainingFlops({"x": 1})
