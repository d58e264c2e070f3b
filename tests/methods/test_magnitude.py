"""Magnitude pruning against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from tests.contracts.cases import masks_by_place
from torchprune_bayes import LayerMagnitude, Magnitude, prune_global

SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=5)


def chain(sizes: list[int]) -> nn.Sequential:
    torch.manual_seed(sum(sizes))
    return nn.Sequential(*map(nn.Linear, sizes, sizes[1:]))


@given(sizes=SIZES, amounts=st.lists(st.floats(0, 1), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_global_masks_are_the_hosts(sizes, amounts):
    ours, hosts = chain(sizes), chain(sizes)
    for amount in amounts:
        prune_global([(layer, "weight") for layer in ours], Magnitude, amount=amount)
        prune.global_unstructured(
            [(layer, "weight") for layer in hosts], prune.L1Unstructured, amount=amount
        )
    assert all(map(torch.equal, masks_by_place(ours), masks_by_place(hosts)))


@given(sizes=SIZES, amount=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_masks_by_layer_are_the_hosts(sizes, amount):
    ours, hosts = chain(sizes), chain(sizes)
    prune_global([(layer, "weight") for layer in ours], LayerMagnitude, amount=amount)
    for layer in hosts:
        prune.l1_unstructured(layer, "weight", amount)
    assert all(map(torch.equal, masks_by_place(ours), masks_by_place(hosts)))


def test_ties_go_by_index_over_all_layers():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    for layer in (first, second):
        nn.init.constant_(layer.weight, -1.0)
    masks = prune_global([(first, "weight"), (second, "weight")], Magnitude, amount=5).masks
    assert [mask.flatten().tolist() for mask in masks.values()] == [
        [False] * 4,
        [False, True, True, True],
    ]


@pytest.mark.parametrize("value", [1.0, -2.0])
def test_the_sign_does_not_matter(value):
    layer = nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[value, 0.5, -0.7]]))
    Magnitude.apply(layer, "weight", amount=2)
    assert layer.weight.tolist() == [[value, 0.0, 0.0]]
