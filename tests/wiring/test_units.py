"""What goes together in every kind of wiring, and that cutting it changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.contracts.state import unchanged
from tests.references.components import components_by_search
from tests.references.masked_twin import masked_twin, random_kept
from tests.wiring.models import WIRED, build
from torchprune_bayes.structured import apply_plan, find_groups, find_units, plan_of
from torchprune_bayes.wiring._components import components


@pytest.mark.parametrize("name", WIRED)
def test_the_right_units_are_found(name: str) -> None:
    model, inputs = build(name)
    with unchanged(model):
        groups = find_groups(model, inputs)
    made = {group.name: group.slices for group in groups}
    found = {}
    for group in groups:
        maker = next(piece for piece in made[group.name] if piece.role == "producer")
        found[group.name] = (group.units, maker.positions.shape[1])
        for piece in group.slices:
            tensor = dict([*model.named_parameters(), *model.named_buffers()])[piece.name]
            assert int(piece.positions.max()) < tensor.shape[piece.dim]
            assert piece.positions.unique().numel() == piece.positions.numel()
    assert found == WIRED[name].groups
    assert {group.kind for group in groups} == ({"head"} if name.startswith("heads") else
            {group.kind for group in groups} - {"head"})  # fmt: skip


@pytest.mark.parametrize("name", [name for name, wired in WIRED.items() if wired.groups])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_cut_network_equals_the_masked_one(name: str, seed: int) -> None:
    model, inputs = build(name)
    model, inputs = model.double(), inputs.double()
    groups = find_groups(model, inputs)
    kept = random_kept(groups, seed)
    expected = masked_twin(model, groups, kept)(inputs)
    cut = copy.deepcopy(model)
    apply_plan(cut, plan_of(cut, groups, kept))
    torch.testing.assert_close(cut(inputs), expected, atol=1e-9, rtol=1e-9)
    if name != "aside if asked":
        outputs = cut.train()(inputs)  # what runs in training only fits as well
        assert isinstance(outputs, Tensor | tuple)


def test_a_branch_that_no_run_reaches_is_named() -> None:
    model, inputs = build("aside if asked")
    units = find_units(model, inputs)
    assert list(units.groups) == []
    assert units.left_out == {
        "a": "`aside`, which the example inputs do not reach, may read its 8 entries",
        "aside": "the example inputs do not reach it",
    }


def test_a_layer_with_a_tied_weight_is_reached_where_the_weight_is() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.table.weight
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.table(tokens)
            return (hidden + self.b(self.a(hidden).relu())) @ self.table.weight.t()

    units = find_units(Tied().eval(), torch.tensor([[1, 2, 3]]))
    assert [group.name for group in units.groups] == ["table", "a"]
    assert units.left_out == {}


@settings(max_examples=50, deadline=None)
@given(
    edges=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30),
    cut=st.integers(0, 30),
)
def test_components(edges: list[tuple[int, int]], cut: int) -> None:
    pairs = [
        (torch.tensor([a for a, _ in part]), torch.tensor([b for _, b in part]))
        for part in (edges[:cut], edges[cut:])
        if part
    ]
    assert components(pairs, 20).tolist() == components_by_search(edges, 20)
