"""Shrinking in stages ends where a schedule of the whole model says; support is known before."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.contracts.state import unchanged
from tests.structured.models import build, images
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import (
    L1FilterImportance,
    Stages,
    check_shrinkable,
    find_groups,
    shrink,
)
from torchprune_bayes.structured.support import OF_THE_MODEL


@pytest.mark.parametrize("target", ["params", "flops", "channels"])
def test_stages_reach_sparsities_of_the_model_at_the_start(target):
    model, x = build("vgg"), images()
    whole = shrink(build("vgg"), x, L1FilterImportance(), sparsity=0.0, target=target)
    stages, amounts = Stages(), {"params": "parameters", "flops": "flops", "channels": "units"}
    before = getattr(whole, amounts[target]).before
    for sparsity in (0.2, 0.2, 0.5, 0.6):
        due = stages.due(sparsity)
        if due is None:
            continue
        report = shrink(model, x, L1FilterImportance(), sparsity=due, target=target, min_keep=2)
        stages.count(report)
        after = getattr(report, amounts[target]).after
        assert after <= (1.0 - sparsity) * before + 1e-6
        assert stages.left == pytest.approx(after / before)


def test_a_group_with_one_unit_left_is_not_counted_twice():
    model, x, stages = build("vgg"), images(), Stages()
    for sparsity in (0.5, 0.6):
        due = stages.due(sparsity)
        stages.count(shrink(model, x, L1FilterImportance(), sparsity=due, target="channels"))
    assert [group.name for group in find_groups(model, x)] == ["0", "3"], "the case that is meant"
    left = sum(model[index].weight.shape[0] for index in (0, 3, 7))
    assert stages.left == pytest.approx(left / 24)


@given(st.floats(0.0, 0.99), st.floats(0.01, 1.0))
def test_what_is_due_leads_to_the_sparsity_of_the_whole(sparsity: float, left: float) -> None:
    due = Stages(left).due(sparsity)
    if due is None:
        assert left <= (1.0 - sparsity) * (1.0 + 1e-8)
    else:
        assert left * (1.0 - due) == pytest.approx(1.0 - sparsity)


def test_support_is_known_without_a_score_and_without_a_trace():
    model, x, bare = build("resnet"), images(), nn.Sequential(nn.Linear(2, 2))
    with unchanged(model):
        units = check_shrinkable(model, x, sparsity=0.5, target="flops")
        with pytest.raises(ArgumentError, match="a sparsity of at most"):
            check_shrinkable(model, x, sparsity=0.9, target="channels", min_keep=4)
        with pytest.raises(ArgumentError, match="Expected units that can be removed"):
            check_shrinkable(bare, torch.zeros(1, 2), sparsity=0.1)
    assert [group.name for group in units.groups] == [g.name for g in find_groups(model, x)]
    nn.utils.parametrizations.weight_norm(model[0])  # a parametrized layer is left whole
    assert "0" not in [group.name for group in check_shrinkable(model, x).groups]


def test_all_that_is_checked_before_training_is_an_option_of_shrinking():
    checked = set(signature(check_shrinkable).parameters)
    assert checked - {"model", "example_inputs", "sparsity"} == set(OF_THE_MODEL)
    assert checked <= set(signature(shrink).parameters)
