"""Hoyer penalties against their formulas, derivatives and laws."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from torchprune_bayes import prune_global
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.training import count_below, group_hoyer_square, hoyer_square


def layer_with(values: Tensor) -> nn.Linear:
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(values)
    return layer


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 5)).double()


def literal_hoyer_square(weights: list[Tensor]) -> float:
    total = 0.0
    for weight in weights:
        values = weight.flatten().tolist()
        total += sum(abs(v) for v in values) ** 2 / sum(v * v for v in values)
    return total


def literal_group_hoyer_square(weights: list[Tensor]) -> float:
    total = 0.0
    for weight in weights:
        square = float((weight**2).sum())
        outputs = sum(float((weight[o] ** 2).sum()) ** 0.5 for o in range(weight.shape[0]))
        inputs = sum(float((weight[:, i] ** 2).sum()) ** 0.5 for i in range(weight.shape[1]))
        total += (outputs**2 + inputs**2) / square
    return total


@pytest.mark.parametrize(
    ("penalty", "literal"),
    [(hoyer_square, literal_hoyer_square), (group_hoyer_square, literal_group_hoyer_square)],
)
def test_values_are_those_of_the_formula(penalty, literal):
    net = model()
    weights = [net[0].weight.detach(), net[2].weight.detach()]
    assert penalty(net).item() == pytest.approx(literal(weights), rel=1e-12)
    assert penalty([(net[2], "weight")]).item() == pytest.approx(literal(weights[1:]), rel=1e-12)


def test_the_gradient_is_that_of_the_paper():
    layer = layer_with(torch.randn(3, 4, dtype=torch.float64))
    w = layer.weight.detach()
    (found,) = torch.autograd.grad(hoyer_square(layer), layer.weight)
    ones, square = w.abs().sum(), w.square().sum()
    torch.testing.assert_close(found, 2 * w.sign() * ones / square * (1 - w.abs() * ones / square))


@pytest.mark.parametrize("penalty", [hoyer_square, group_hoyer_square])
def test_gradients_pass_gradcheck(penalty):
    torch.manual_seed(1)
    layer = nn.Linear(3, 4, bias=False).double()

    def value(weight: Tensor) -> Tensor:
        twin = nn.Linear(3, 4, bias=False)
        del twin.weight
        twin._parameters["weight"] = cast(nn.Parameter, weight)  # a part of gradcheck's graph
        return penalty([(twin, "weight")])

    assert torch.autograd.gradcheck(value, (layer.weight.detach().requires_grad_(),))


@given(
    values=st.lists(st.floats(-10, 10).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=12),
    zeros=st.integers(0, 5),
    scale=st.floats(0.01, 100),
)
def test_it_counts_and_does_not_see_the_scale(values, zeros, scale):
    row = torch.tensor([values + [0.0] * zeros], dtype=torch.float64)
    found = hoyer_square(layer_with(row)).item()
    assert 1 - 1e-9 <= found <= len(values) + 1e-9
    assert hoyer_square(layer_with(scale * row)).item() == pytest.approx(found, rel=1e-9)
    assert hoyer_square(layer_with(row.sign())).item() == pytest.approx(len(values), rel=1e-12)


@pytest.mark.parametrize("penalty", [hoyer_square, group_hoyer_square])
def test_zeros_have_a_penalty_and_a_gradient_of_zero(penalty):
    layer = layer_with(torch.zeros(2, 3))
    (gradient,) = torch.autograd.grad(penalty(layer), layer.weight)
    assert penalty(layer).item() == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("penalty", [hoyer_square, group_hoyer_square])
def test_pruned_weights_do_not_count(penalty):
    net, twin = model(), model()
    prune_global([(net[2], "weight")], "magnitude", amount=0.5)
    with torch.no_grad():
        twin[2].weight.mul_(net[2].weight_mask)
        net[2].weight_orig.add_(1.0 - net[2].weight_mask)  # as an optimizer might have
    assert penalty(net).item() == pytest.approx(penalty(twin).item(), rel=1e-12)
    penalty(net).backward()
    assert not net[2].weight_orig.grad[net[2].weight_mask == 0].any()


def test_training_with_it_leaves_few_large_weights():
    torch.manual_seed(0)
    layer = nn.Linear(20, 1, bias=False)
    x = torch.randn(200, 20)
    y = x[:, :3].sum(1, keepdim=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean() + 0.02 * hoyer_square(layer)
        loss.backward()
        optimizer.step()
    assert count_below(layer, 0.05) == 17
    prune_global([(layer, "weight")], "magnitude", amount=17)
    assert layer.weight_mask.nonzero()[:, 1].tolist() == [0, 1, 2]


def test_count_below_leaves_out_what_is_pruned():
    layer = layer_with(torch.tensor([[1e-4, 1.0, -1e-4, 2.0]]))
    assert count_below(layer, 1e-3) == 2
    prune.custom_from_mask(layer, "weight", torch.tensor([[0, 1, 1, 1]]))
    assert count_below(layer, 1e-3) == 1
    assert count_below(layer, 1.0) == 2


def test_refuses_what_has_no_groups_or_is_no_parameter():
    layer = nn.Linear(2, 2)
    with pytest.raises(ParameterError, match="two dimensions"):
        group_hoyer_square([(layer, "bias")])
    with pytest.raises(ParameterError, match="parameter `mask`"):
        hoyer_square([(layer, "mask")])
    with pytest.raises(ArgumentError, match="threshold"):
        count_below(layer, 0.0)
