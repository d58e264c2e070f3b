"""Folding removes gates and leaves the output."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.gates.cases import FAMILIES, built, scatter
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates import Site, attach_gates, fold_gates, gates_of


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_the_output_and_nothing_of_the_gates(family):
    model, x = built(family)
    names = set(model.state_dict())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    gates = attach_gates(model)
    scatter(gates)
    before = model(x)
    expected = {name: mask.clone() for name, mask in gates.masks.items()}
    masks = fold_gates(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    with pytest.raises(ArgumentError, match="got none"):
        gates_of(model)


def test_residual_gates_fold_too():
    model, x = built("timm-resnet18")
    gates = attach_gates(model, residual=True)
    scatter(gates)
    before = model(x)
    fold_gates(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_float64_folds_exactly_and_both_sides_of_a_layer_at_once():
    model, x = built("mlp")
    model, x = model.double(), x.double()
    scatter(attach_gates(model, [Site("2", "in", 5), Site("2", "out", 4), Site("4", "in", 4)]))
    before = model(x)
    fold_gates(model)
    torch.testing.assert_close(model(x), before, rtol=1e-13, atol=1e-13)


def test_closed_units_become_exact_zeros():
    model, _ = built("lenet")
    gates = attach_gates(model)
    gates["conv1"].close(torch.tensor([False, True, False]))
    gates["fc2:in"].close(torch.arange(8) == 3)
    fold_gates(model)
    assert not model.conv1.weight[1].any()
    assert model.conv1.bias[1] == 0
    assert not model.fc2.weight[:, 3].any()
    assert model.fc2.weight[:, :3].all()


def test_a_layer_pruned_by_the_host_keeps_its_masks():
    model, x = built("mlp")
    prune.l1_unstructured(model[2], "weight", 0.5)
    mask = model[2].weight_mask.clone()
    scatter(attach_gates(model), closed=False)
    before = model(x)
    fold_gates(model)
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model[2].weight_mask, mask)


def test_other_hooks_stay():
    model, x = built("mlp")
    calls: list[nn.Module] = []
    model[2].register_forward_pre_hook(lambda module, args: calls.append(module))
    attach_gates(model)
    fold_gates(model)
    model(x)
    assert calls == [model[2]]
