"""The order in which units go, and how many it takes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.ranking import (
    blocks_below,
    blocks_to_reach,
    left_to_reach,
    rank_units,
)
from torchprune_bayes.structured.unit_costs import TensorSize, UnitCosts

INF = float("inf")


def groups_of(*units: int) -> list[UnitGroup]:
    return [UnitGroup(f"g{index}", "channel", count, ()) for index, count in enumerate(units)]


def chain_costs(groups: list[UnitGroup]) -> UnitCosts:
    """A chain of square matrices, each reading the group before it, with 3 inputs, 2 outputs."""
    sizes = {}
    for index in range(len(groups) + 1):
        ends = [groups[i] if 0 <= i < len(groups) else None for i in (index, index - 1)]
        shape = tuple(
            group.units if group else size for group, size in zip(ends, (2, 3), strict=True)
        )
        entries = {dim: {group.name: 1} for dim, group in enumerate(ends) if group}
        sizes[f"w{index}"] = TensorSize(shape, entries)
    units = {group.name: group.units for group in groups}
    return UnitCosts(units, sizes, {"w0": 7 * math.prod(sizes["w0"].shape)}, {}, 11)


def slowly(
    groups: list[UnitGroup], scores: dict[str, Tensor], costs: UnitCosts, sparsity: float
) -> dict[str, set[int]]:
    """Remove the least unit that may go, one after the other, until enough parameters are gone."""
    left = {group.name: set(range(group.units)) for group in groups}
    start = costs.parameters({})
    while (
        costs.parameters({name: len(units) for name, units in left.items()})
        > (1 - sparsity) * start + 1e-9
    ):
        candidates = [
            (float(scores[group.name][unit]), index, unit)
            for index, group in enumerate(groups)
            for unit in left[group.name]
            if len(left[group.name]) > 1
        ]
        _, index, unit = min(candidates)
        left[groups[index].name].remove(unit)
    return left


@given(
    units=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    sparsity=st.floats(0.0, 0.6),
    data=st.data(),
)
def test_the_line_is_that_of_removing_one_by_one(units, sparsity, data):
    groups = groups_of(*units)
    costs = chain_costs(groups)
    few = st.integers(-2, 2).map(float)
    rows = [data.draw(st.lists(few, min_size=count, max_size=count)) for count in units]
    scores = {group.name: torch.tensor(row) for group, row in zip(groups, rows, strict=True)}
    ranking = rank_units(groups, scores)
    least = costs.parameters(ranking.left(len(ranking.group)))
    if least > (1 - sparsity) * costs.parameters({}):
        with pytest.raises(ArgumentError, match="a sparsity of at most"):
            blocks_to_reach(ranking, costs, "params", sparsity)
        return
    kept = ranking.kept(blocks_to_reach(ranking, costs, "params", sparsity))
    expected = slowly(groups, scores, costs, sparsity)
    for group in groups:
        found = kept.get(group.name, torch.arange(group.units))
        assert set(found.tolist()) == expected[group.name]
        assert found.tolist() == sorted(found.tolist())


@pytest.mark.parametrize("resource", ["params", "channels", "flops"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.7])
def test_one_unit_less_would_not_be_enough(resource, sparsity):
    groups = groups_of(20, 30, 10)
    costs = chain_costs(groups)
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.units, generator=generator) for group in groups}
    ranking = rank_units(groups, scores)
    blocks = blocks_to_reach(ranking, costs, resource, sparsity)
    budget = (1 - sparsity) * costs.total(resource, {}) * (1 + 1e-9)
    assert costs.total(resource, ranking.left(blocks)) <= budget
    assert blocks == 0 or costs.total(resource, ranking.left(blocks - 1)) > budget


@given(
    units=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    sparsity=st.floats(0.0, 0.6),
    round_to=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_no_group_loses_a_block_in_vain(units, sparsity, round_to, seed):
    groups = groups_of(*units)
    costs = chain_costs(groups)
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.units, generator=generator) for group in groups}
    ranking = rank_units(groups, scores, round_to=round_to)
    budget = (1 - sparsity + 1e-12) * costs.parameters({})
    if costs.parameters(ranking.left(len(ranking.group))) > budget:
        return
    blocks = blocks_to_reach(ranking, costs, "params", sparsity)
    left = left_to_reach(ranking, costs, "params", sparsity)
    assert costs.parameters(left) <= budget
    assert all(left[name] >= count for name, count in ranking.left(blocks).items())
    for group in groups:
        missing = group.units - left[group.name]
        if missing:
            rest = group.units % round_to
            back = rest if missing == rest else round_to
            more = {**left, group.name: left[group.name] + back}
            assert costs.parameters(more) > budget
    kept = ranking.best(left)
    assert all(len(kept[name]) == count for name, count in left.items() if name in kept)


def test_a_large_last_block_gives_the_smaller_ones_back():
    groups = groups_of(2, 100)
    sizes = {
        "heads": TensorSize((2, 50), {0: {"g0": 1}}),
        "hidden": TensorSize((100,), {0: {"g1": 1}}),
    }
    costs = UnitCosts({"g0": 2, "g1": 100}, sizes, {}, {}, 0)
    scores = {"g0": torch.tensor([0.305, 9.0]), "g1": torch.arange(100.0) / 100}
    ranking = rank_units(groups, scores)
    assert blocks_to_reach(ranking, costs, "params", 0.2) == 32  # 31 units and the head, 81 of 200
    assert left_to_reach(ranking, costs, "params", 0.2) == {"g0": 1, "g1": 100}
    assert left_to_reach(ranking, costs, "params", 0.26) == {"g0": 1, "g1": 98}


def test_channels_are_counted_exactly():
    groups = groups_of(7, 3)
    ranking = rank_units(groups, {"g0": torch.arange(7.0), "g1": torch.arange(3.0)})
    for gone in range(9):
        assert blocks_to_reach(ranking, chain_costs(groups), "channels", gone / 10) == gone


def test_ties_go_by_group_then_by_index():
    groups = groups_of(3, 3)
    ranking = rank_units(groups, {"g0": torch.ones(3), "g1": torch.ones(3)})
    assert ranking.group.tolist() == [0, 0, 1, 1]
    assert {name: units.tolist() for name, units in ranking.kept(3).items()} == {
        "g0": [2],
        "g1": [1, 2],
    }


def test_floors_hold_in_every_group():
    groups = groups_of(5, 2, 3)
    scores = {f"g{i}": torch.arange(float(g.units)) for i, g in enumerate(groups)}
    ranking = rank_units(groups, scores, min_keep=3)
    assert ranking.left(len(ranking.group)) == {"g0": 3, "g1": 2, "g2": 3}


@given(units=st.integers(1, 40), round_to=st.integers(1, 9), min_keep=st.integers(1, 12))
def test_what_is_left_is_a_multiple(units, round_to, min_keep):
    [group] = groups = groups_of(units)
    generator = torch.Generator().manual_seed(units)
    ranking = rank_units(
        groups,
        {"g0": torch.rand(units, generator=generator)},
        min_keep=min_keep,
        round_to=round_to,
    )
    for blocks in range(1, len(ranking.group) + 1):
        left = ranking.left(blocks)[group.name]
        assert left % round_to == 0
        assert left >= min_keep
        assert ranking.left(blocks - 1)[group.name] - left <= round_to
    last = ranking.left(len(ranking.group))["g0"]
    assert last - round_to < min_keep or last in (units, round_to)


def test_blocks_are_ranked_by_their_mean():
    groups = groups_of(5, 2)
    scores = {"g0": torch.tensor([9.0, 1.0, 3.0, 5.0, 2.0]), "g1": torch.tensor([2.6, 2.4])}
    ranking = rank_units(groups, scores, round_to=2)
    # g0: first the one above a multiple of two, then the pair (2, 3), then (5, 9) is the floor.
    assert ranking.score.tolist() == [1.0, 2.5]
    assert ranking.left(2) == {"g0": 2, "g1": 2}


def test_in_a_layer_scope_all_groups_lose_the_same_fraction():
    groups = groups_of(10, 20, 40)
    generator = torch.Generator().manual_seed(0)
    scores = {
        group.name: 10.0**place * torch.rand(group.units, generator=generator)
        for place, group in enumerate(groups)
    }
    ranking = rank_units(groups, scores, scope="layer")
    blocks = blocks_to_reach(ranking, chain_costs(groups), "channels", 0.3)
    assert ranking.left(blocks) == {"g0": 7, "g1": 14, "g2": 28}
    for name, units in ranking.kept(blocks).items():
        gone = torch.ones(len(scores[name]), dtype=torch.bool)
        gone[units] = False
        assert scores[name][gone].max() < scores[name][units].min()


def test_groups_without_scores_stay_whole():
    ranking = rank_units(groups_of(4, 4), {"g1": torch.arange(4.0)})
    assert ranking.left(3) == {"g0": 4, "g1": 1}
    nothing = rank_units(groups_of(4), {})
    assert nothing.kept(0) == {}
    assert blocks_below(nothing, 0.0) == 0


def test_what_scores_below_a_threshold():
    groups = groups_of(3, 3)
    scores = {"g0": torch.tensor([-1.0, 0.0, 2.0]), "g1": torch.tensor([-3.0, -2.0, -1.0])}
    ranking = rank_units(groups, scores)
    assert blocks_below(ranking, 0.0) == 3
    assert ranking.left(3) == {"g0": 2, "g1": 1}


def test_infinite_scores_have_their_places():
    ranking = rank_units(groups_of(4), {"g0": torch.tensor([INF, 0.0, -INF, INF])}, round_to=2)
    assert ranking.kept(1)["g0"].tolist() == [0, 3]
    single = rank_units(groups_of(4), {"g0": torch.tensor([INF, 0.0, -INF, INF])})
    assert single.score.tolist() == [-INF, 0.0, INF]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(3), "4 floating point scores for `g0`"),
        (torch.zeros(4, 1), "4 floating point scores for `g0`"),
        (torch.zeros(4, dtype=torch.long), "4 floating point scores for `g0`"),
        (torch.tensor([0.0, math.nan, 1.0, math.nan]), "without NaN for `g0`, got 2"),
    ],
)
def test_impossible_scores_are_refused(scores, message):
    with pytest.raises(ArgumentError, match=message):
        rank_units(groups_of(4), {"g0": scores})
