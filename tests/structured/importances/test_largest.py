"""Units none of whose weights is large."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import LargestWeightImportance, find_groups, shrink

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3)),
    ).eval()


@pytest.mark.parametrize("by", ["producer", "norm", "consumer"])
def test_scores_are_the_largest_absolute_weights(by):
    model = net()
    groups = find_groups(model, X)
    found = {g.name: LargestWeightImportance(by).score(g, model) for g in groups}
    first, second = model[0].weight.abs(), model[3].weight.abs()
    expected = {
        "producer": (first.flatten(1).amax(1), second.flatten(1).amax(1)),
        "norm": (torch.maximum(model[1].weight.abs(), model[1].bias.abs()), None),
        "consumer": (
            second.transpose(0, 1).flatten(1).amax(1),
            model[7].weight.abs().view(3, 5, 4).amax((0, 2)),
        ),
    }[by]
    for score, value in zip(found.values(), expected, strict=True):
        if value is None:
            assert score is None
        else:
            torch.testing.assert_close(score, value.double())


@pytest.mark.parametrize("by", ["norm", "consumer", "any"])
def test_units_that_are_closed_are_cut_and_no_output_changes(by):
    model = net()
    with torch.no_grad():
        if by == "consumer":
            model[3].weight[:, 1:4] = 0.0
            model[7].weight.view(3, 5, 4)[:, 2] = 0.0
        else:
            model[1].weight[1:4] = 0.0
            model[1].bias[1:4] = 0.0
        if by == "any":
            model[3].weight[2] = 0.0
            model[3].bias[2] = 0.0
    before = model(X)
    shrink(model, X, LargestWeightImportance(by, threshold=1e-12), target="evidence")
    assert model[0].out_channels == 3
    assert model[3].out_channels == (5 if by == "norm" else 4)
    torch.testing.assert_close(model(X), before)


def test_a_row_that_a_norm_follows_does_not_count_as_closed():
    model = net()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = 0.0  # the norm's shift remains
    twin = copy.deepcopy(model)
    shrink(model, X, LargestWeightImportance("any", threshold=1e-12), target="evidence")
    assert model[0].out_channels == 6
    shrink(twin, X, LargestWeightImportance(), target="evidence")
    assert twin[0].out_channels == 5


@pytest.mark.parametrize("options", [{"by": "bias"}, {"threshold": 0.0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ArgumentError):
        LargestWeightImportance(**options)
