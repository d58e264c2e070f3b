"""Costs as functions of the units that are left, against models that are really cut."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.contracts.state import unchanged
from tests.references.flops import flops_without_fused_kernels
from tests.references.masked_twin import random_kept
from tests.structured.models import SMALL, build, images, timm_model, torchvision_model
from torchprune_bayes.costs import flop_counter
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
from torchprune_bayes.structured.slicing import apply_plan, plan_of
from torchprune_bayes.structured.tracing import find_groups
from torchprune_bayes.structured.unit_costs import TensorSize, UnitCosts


def recount(model: nn.Module, inputs: torch.Tensor) -> tuple[int, int]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, flops_without_fused_kernels(model, inputs)


def check_costs(model: nn.Module, inputs: torch.Tensor) -> None:
    groups = find_groups(model, inputs)
    costs = UnitCosts.measure(model, groups, inputs)
    assert (costs.parameters({}), costs.flops({})) == recount(model, inputs)
    kept = random_kept(groups)
    left = {name: len(units) for name, units in kept.items()}
    apply_plan(model, plan_of(model, groups, kept))
    assert (costs.parameters(left), costs.flops(left)) == recount(model, inputs)
    assert costs.count(left) == sum(left.values())


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name):
    check_costs(build(name), images())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (torchvision_model, "resnet18"),
        (torchvision_model, "mobilenet_v2"),
        (timm_model, "convnext_tiny"),
    ],
)
def test_published_architectures(make, name):
    with torch.random.fork_rng():
        check_costs(make(name).eval(), images(1, 64))


class OwnProducts(nn.Module):
    """Multiplies by parameters of its own, transposed and in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(12, 8))
        self.second = nn.Parameter(torch.randn(12, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = (x @ self.first.T).relu()
        return self.last((hidden @ self.second).relu())


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.cells = kind(8, 6, batch_first=True, **options)
        self.last = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.cells(x)[0][:, -1])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (OwnProducts, (4, 8)),
        (encoder, (2, 5, 8)),
        (partial(Recurrent, nn.LSTM), (2, 5, 8)),
        (partial(Recurrent, nn.GRU, num_layers=2), (2, 5, 8)),
        (partial(Recurrent, nn.RNN, bidirectional=True), (2, 5, 8)),
    ],
)
def test_weights_under_any_name_cost_what_they_are_used_for(make, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = make().eval(), torch.randn(shape)
    groups = find_groups(model, inputs)
    costs = UnitCosts.measure(model, groups, inputs)
    assert groups
    assert costs.flops({}) == counted(model, inputs)
    kept = random_kept(groups)
    left = {name: len(units) for name, units in kept.items()}
    for name, units in left.items():
        assert costs.flops({name: units}) < costs.flops({})
    apply_plan(model, plan_of(model, groups, kept))
    assert costs.flops(left) == counted(model, inputs)


def counted(model: nn.Module, inputs: torch.Tensor) -> int:
    with torch.no_grad(), flop_counter() as counter:
        model(inputs)
    return int(counter.get_total_flops())


def test_attention_costs_follow_its_heads():
    with torch.random.fork_rng():
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    inputs = images(2, 32)
    costs = UnitCosts.measure(model, find_groups(model, inputs), inputs)
    assert set(costs.head_flops) == {"blocks.0.attn.qkv", "blocks.1.attn.qkv"}
    check_costs(model, inputs)


@given(st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_every_count_is_a_product_of_what_is_left(gone):
    size = TensorSize((4, 9, 2), {0: {"a": 1}, 1: {"b": 2, "c": 1}})
    a, b, c = gone
    lost = {"a": a, "b": b, "c": c}
    assert size.numel(lost) == (4 - a) * (9 - 2 * b - c) * 2


def test_layers_that_run_often_count_every_time():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + self.second(self.first(-x))

    model = Twice()
    column = torch.arange(6)[:, None]
    slices = tuple(
        UnitSlice(name, dim, column, "producer")
        for name, dim in (("first.weight", 0), ("first.bias", 0), ("second.weight", 1))
    )
    group = UnitGroup("first", "hidden", 6, slices)
    costs = UnitCosts.measure(model, [group], torch.zeros(5, 4))
    assert costs.flops({}) == 2 * 2 * 5 * (4 * 6 + 6 * 3)
    assert costs.flops({"first": 2}) == 2 * 2 * 5 * (4 * 2 + 2 * 3)


def test_matrix_products_outside_of_layers_are_counted_as_they_are():
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(torch.relu(self.inner(x))) * (x @ x.T).mean()

    check_costs(Bilinear(), torch.ones(3, 4))


def test_measuring_leaves_no_trace():
    model = nn.Sequential(build("resnet"), nn.Dropout(0.5)).train()
    with unchanged(model):
        UnitCosts.measure(model, [], images())


class Token(nn.Module):
    """A learnt token that goes into a module as a view of its parameter."""

    def __init__(self):
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(self.token.expand(len(x), -1)) + x


def test_a_view_of_a_parameter_may_go_into_a_module():
    model = Token()
    with unchanged(model):
        costs = UnitCosts.measure(model, [], torch.ones(2, 3))
    assert costs.total("flops", {}) == 2 * 2 * 4 * 3
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_inputs_there_are_no_flops():
    model = build("vgg")
    costs = UnitCosts.measure(model, find_groups(model, images()))
    assert costs.flops({}) == 0
    assert costs.parameters({}) == sum(parameter.numel() for parameter in model.parameters())


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    costs = UnitCosts.measure(model, [], torch.zeros(1, 4))
    assert costs.parameters({}) == 16
    assert costs.flops({}) == 64


def test_groups_of_another_model_are_refused():
    slices = (UnitSlice("body.weight", 0, torch.arange(2)[:, None], "producer"),)
    with pytest.raises(ArgumentError, match=r"a tensor `body\.weight` in the model"):
        UnitCosts.measure(nn.Linear(2, 2), [UnitGroup("body", "hidden", 2, slices)])
