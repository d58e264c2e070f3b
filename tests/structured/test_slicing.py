"""Cutting: what stays, what keeps its identity, and what nothing may touch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.contracts.state import unchanged
from tests.references.masked_twin import masked_twin, random_kept
from tests.structured.models import SMALL, build, images
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.structured._layer_sizes import layer_sizes
from torchprune_bayes.structured.groups import AttributeRule, UnitGroup, UnitSlice
from torchprune_bayes.structured.slicing import (
    ShrinkPlan,
    apply_plan,
    groups_after,
    plan_of,
    zero_units,
)
from torchprune_bayes.structured.tracing import find_groups


def column(units: int) -> torch.Tensor:
    return torch.arange(units)[:, None]


def chain() -> tuple[nn.Sequential, list[UnitGroup]]:
    """Two linear layers with three units between them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    slices = (
        UnitSlice("0.weight", 0, column(3), "producer"),
        UnitSlice("0.bias", 0, column(3), "producer"),
        UnitSlice("2.weight", 1, column(3), "consumer"),
    )
    return model, [UnitGroup("0", "hidden", 3, slices)]


@pytest.mark.parametrize("name", SMALL)
def test_the_cut_model_computes_what_the_masked_twin_computes(name):
    model, inputs = build(name), images()
    groups = find_groups(model, inputs)
    kept = random_kept(groups)
    expected = masked_twin(model, groups, kept)(inputs)
    before = sum(parameter.numel() for parameter in model.parameters())
    apply_plan(model, plan_of(model, groups, kept))
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.8 * before
    torch.testing.assert_close(model(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_zeroed_units_are_those_of_the_masked_twin(name):
    model, inputs = build(name), images()
    groups = find_groups(model, inputs)
    kept = random_kept(groups)
    twin = masked_twin(model, groups, kept)
    zero_units(model, plan_of(model, groups, kept))
    for (key, found), expected in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), key


@pytest.mark.parametrize("name", SMALL)
def test_two_cuts_are_one(name):
    model, inputs = build(name), images()
    once = copy.deepcopy(model)
    groups = find_groups(model, inputs)
    first = random_kept(groups, 0.75)
    plan = plan_of(model, groups, first)
    apply_plan(model, plan)
    between = groups_after(groups, plan, first)
    second = random_kept(between, 0.5, seed=1)
    apply_plan(model, plan_of(model, between, second))
    both = {key: first[key].sort().values[second[key]] for key in first}
    apply_plan(once, plan_of(once, groups, both))
    assert str(model) == str(once)
    for found, expected in zip(
        model.state_dict().values(), once.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected)


def test_groups_after_a_cut_are_those_found_again():
    model, inputs = build("dense"), images()
    groups = find_groups(model, inputs)
    kept = random_kept(groups)
    plan = plan_of(model, groups, kept)
    apply_plan(model, plan)
    for ours, found in zip(
        groups_after(groups, plan, kept), find_groups(model, inputs), strict=True
    ):
        assert (ours.name, ours.units) == (found.name, found.units)
        for one, other in zip(ours.slices, found.slices, strict=True):
            assert one.name == other.name
            assert torch.equal(one.positions, other.positions)


@given(
    size=st.integers(2, 9),
    dims=st.sets(st.integers(0, 2), min_size=1),
    data=st.data(),
)
def test_expanding_then_cutting_gives_the_tensor_back(size, dims, data):
    indices = st.lists(st.integers(0, size - 1), min_size=1, unique=True).map(sorted)
    kept = {dim: torch.tensor(data.draw(indices)) for dim in dims}
    plan = ShrinkPlan({"w": kept}, {"w": (size,) * 3}, {})
    whole = torch.arange(size**3, dtype=torch.float64).reshape(size, size, size) + 1
    small = plan.cut("w", whole)
    back = plan.expand("w", small)
    assert torch.equal(plan.cut("w", back), small)
    assert int((back != 0).sum()) == small.numel()
    assert torch.equal(back[back != 0], whole[back != 0])
    assert plan.cut("other", whole) is whole
    assert torch.equal(plan.masked("w", whole), back)


def test_what_a_parameter_carries_is_carried_over():
    model, groups = chain()
    model.to(torch.float64)
    model[0].bias.requires_grad_(False)
    model[0].weight.decay = 0.0
    model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    gradient = model[0].weight.grad.clone()
    second = model[2].bias
    change = apply_plan(model, plan_of(model, groups, {"0": torch.tensor([2, 0])}))
    weight = model[0].weight
    assert type(weight) is nn.Parameter
    assert weight.dtype == torch.float64
    assert weight.is_leaf
    assert weight.requires_grad
    assert not model[0].bias.requires_grad
    assert weight.decay == 0.0
    assert torch.equal(weight.grad, gradient[[0, 2]])
    assert model[2].bias is second
    assert change.parameters["0.weight"][1] is weight
    assert set(change.parameters) == {"0.weight", "0.bias", "2.weight"}
    assert (model[0].out_features, model[2].in_features) == (2, 2)


def test_the_memory_format_is_kept():
    model = build("resnet").to(memory_format=torch.channels_last)
    groups = find_groups(model, images())
    apply_plan(model, plan_of(model, groups, random_kept(groups)))
    weight = model[3].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_tied_tensors_stay_tied():
    model, groups = chain()
    model.add_module("other", nn.Linear(4, 3))
    model.other.weight = model[0].weight
    apply_plan(model, plan_of(model, groups, {"0": torch.tensor([1])}))
    assert model.other.weight is model[0].weight
    assert model.other.out_features == 1


def test_values_replace_what_is_cut():
    model, groups = chain()
    value = torch.full((2, 3), 7.0)
    old = model[2].weight
    before = old.detach().clone()
    plan = plan_of(model, groups, {"0": torch.tensor([1])})
    bias = torch.ones(2)
    apply_plan(model, plan, values={"2.weight": value, "2.bias": bias})
    assert model[2].weight.tolist() == [[7.0], [7.0]]
    assert model[2].bias.tolist() == [1.0, 1.0]
    assert torch.equal(old, before)
    bias.zero_()
    assert model[2].bias.tolist() == [1.0, 1.0]


def test_a_cut_can_be_undone_and_done_again():
    model, inputs = build("depthwise"), images()
    groups = find_groups(model, inputs)
    with unchanged(model):
        change = apply_plan(model, plan_of(model, groups, random_kept(groups)))
        cut, after = str(model), model(inputs)
        change.undo()
    change.redo()
    assert str(model) == cut
    assert torch.equal(model(inputs), after)


def test_tensors_that_lose_nothing_are_not_in_the_plan():
    model, groups = chain()
    assert plan_of(model, groups, {}).kept == {}
    assert plan_of(model, groups, {"0": torch.arange(3)}).kept == {}


def test_rules_set_numbers_on_modules():
    model, [group] = chain()
    model[1].width = 12
    rules = (AttributeRule("1", "width", 4),)
    group = UnitGroup(group.name, "head", 3, group.slices, rules)
    apply_plan(model, plan_of(model, [group], {"0": torch.tensor([0, 1])}))
    assert model[1].width == 8


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda model, plan: setattr(model[2], "weight", nn.Parameter(torch.zeros(2, 5))),
         ArgumentError, "as in the plan"),
        (lambda model, plan: plan.attributes.update({"1": {"heads": 2}}),
         ParameterError, "a plain attribute `heads`"),
        (lambda model, plan: setattr(model[2], "weight", _Special(torch.zeros(2, 3))),
         ParameterError, "to be a plain parameter, got _Special"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_changes(spoil, error, message):
    model, groups = chain()
    plan = plan_of(model, groups, {"0": torch.tensor([1])})
    spoil(model, plan)
    with unchanged(model), pytest.raises(error, match=message):
        apply_plan(model, plan)


class _Special(nn.Parameter):
    """A parameter with behaviour of its own."""


def test_groups_of_another_model_are_refused():
    model, groups = chain()
    with pytest.raises(ArgumentError, match=r"a tensor `0\.weight` with dimension 0"):
        plan_of(nn.Tanh(), groups, {"0": torch.tensor([1])})
    model[2] = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"positions in \[0, 2\) for `2.weight`"):
        plan_of(model, groups, {"0": torch.tensor([1])})


def test_values_of_another_shape_are_refused():
    model, groups = chain()
    plan = plan_of(model, groups, {"0": torch.tensor([1])})
    with unchanged(model), pytest.raises(ArgumentError, match=r"of shape \(3,\), got \(2,\)"):
        apply_plan(model, plan, values={"0.bias": torch.zeros(2)})


def test_layers_with_several_matrices_in_a_tensor_are_refused():
    with pytest.raises(ParameterError, match="one matrix per tensor, got `rnn`"):
        layer_sizes("rnn", nn.Bilinear(2, 3, 4), {})
    with pytest.raises(ParameterError, match="one input projection and no further keys, got `rnn`"):
        layer_sizes("rnn", nn.MultiheadAttention(4, 2, kdim=3), {})
    with pytest.raises(ParameterError, match="whole heads to be cut out of `rnn`"):
        layer_sizes("rnn", nn.MultiheadAttention(4, 2), {"in_proj_weight": torch.zeros(9, 4)})


def test_sizes_are_read_off_the_tensors():
    shapes = [
        (nn.Conv2d(8, 4, 3, groups=2), (2, 4, 3, 3), {"out_channels": 2, "in_channels": 8}),
        (nn.ConvTranspose2d(8, 4, 3), (5, 2, 3, 3), {"in_channels": 5, "out_channels": 2}),
        (nn.LayerNorm(8), (3,), {"normalized_shape": (3,)}),
        (nn.Embedding(8, 4), (8, 3), {"num_embeddings": 8, "embedding_dim": 3}),
        (nn.PReLU(4), (2,), {"num_parameters": 2}),
    ]
    for layer, shape, expected in shapes:
        assert layer_sizes("layer", layer, {"weight": torch.zeros(shape)}) == expected
    with pytest.raises(ParameterError, match="to fall into its 2 groups, got 3"):
        layer_sizes("conv", nn.Conv2d(8, 4, 3, groups=2), {"weight": torch.zeros(3, 4, 3, 3)})
