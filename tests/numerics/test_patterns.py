from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprune_bayes._numerics import patterns
from torchprune_bayes._numerics.fisher_blocks import invert
from torchprune_bayes._numerics.patterns import (
    group_inverses,
    group_scores,
    merged,
    n_of_m_ranks,
    n_of_m_scores,
)
from torchprune_bayes._numerics.swaps import SelectionObjective
from torchprune_bayes.errors import ArgumentError


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size, groups = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 9)), size * groups)
    gradients = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(shape[0], shape[2], generator=generator, dtype=torch.float64)
    return gradients, weights, draw(st.sampled_from([1e-2, 1.0])), size


def inverses_of(gradients, damping):
    eye = torch.eye(gradients.shape[-1], dtype=torch.float64)
    return (gradients.mT @ gradients / gradients.shape[-2] + damping * eye).inverse()


def cost(inverse, weights, pruned):
    pruned = list(pruned)
    return float(weights[pruned] @ inverse[pruned][:, pruned].inverse() @ weights[pruned]) / 2


@settings(max_examples=40)
@given(problems(), st.integers(1, 3))
def test_group_inverses_are_the_diagonal_blocks(problem, chunk):
    gradients, _, damping, size = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_GROUPS", chunk)
        found = group_inverses(invert(gradients, damping), size)
    for block, inverse in enumerate(inverses_of(gradients, damping)):
        for group, part in enumerate(torch.arange(len(inverse)).split(size)):
            torch.testing.assert_close(found[block, group], inverse[part][:, part])


@settings(max_examples=40)
@given(problems())
def test_group_scores_are_the_cost_of_removing_the_group(problem):
    gradients, weights, damping, size = problem
    scores = group_scores(invert(gradients, damping), weights, size)
    for block, inverse in enumerate(inverses_of(gradients, damping)):
        for part in torch.arange(len(inverse)).split(size):
            expected = cost(inverse, weights[block], part.tolist())
            assert scores[block, part].tolist() == pytest.approx([expected] * size)


@settings(max_examples=40)
@given(problems(), st.data())
def test_the_cheapest_way_to_keep_n_of_m_is_taken(problem, data):
    gradients, weights, damping, size = problem
    kept = data.draw(st.integers(1, size - 1))
    scores = n_of_m_scores(invert(gradients, damping), weights, kept, size)
    for block, inverse in enumerate(inverses_of(gradients, damping)):
        for part in torch.arange(len(inverse)).split(size):
            pruned = part[scores[block, part] < 1].tolist()
            assert len(pruned) == size - kept
            ways = combinations(part.tolist(), size - kept)
            least = min(cost(inverse, weights[block], way) for way in ways)
            assert cost(inverse, weights[block], pruned) <= least * (1 + 1e-9)


def test_groups_that_do_not_fit_are_refused():
    inverse = invert(torch.ones(1, 1, 6), damping=1.0)
    with pytest.raises(ArgumentError, match="multiple of 4"):
        group_scores(inverse, torch.ones(1, 6), 4)
    for kept in (0, 3):
        with pytest.raises(ArgumentError, match="N:M"):
            n_of_m_scores(inverse, torch.ones(1, 6), kept, 3)


@settings(max_examples=40)
@given(problems(), st.data())
def test_pruned_entries_fill_the_pattern_before_remaining_ones(problem, data):
    gradients, weights, damping, size = problem
    kept = data.draw(st.integers(1, size - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    remaining = torch.rand(weights.shape, generator=generator) < 0.6
    gradients, weights = gradients * remaining.unsqueeze(1), weights * remaining
    weights[:, 0] = 0.0  # a remaining weight may be zero as well
    by_cost = n_of_m_scores(invert(gradients, damping), weights, kept, size, remaining)
    for scores in (by_cost, n_of_m_ranks(weights.abs(), kept, size, remaining)):
        left = ((scores >= 1) & remaining).unflatten(-1, (-1, size)).sum(-1)
        before = remaining.unflatten(-1, (-1, size)).sum(-1)
        assert torch.equal(left, before.clamp_max(kept))


@settings(max_examples=40)
@given(problems(), st.data())
def test_pruning_a_merged_group_is_pruning_its_entries(problem, data):
    gradients, weights, damping, size = problem
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    keep = torch.rand(len(weights), weights.shape[1] // size, generator=generator) < 0.5
    of_groups = SelectionObjective(*merged(gradients, weights, size), keep, damping)
    of_entries = SelectionObjective(
        gradients, weights, keep.repeat_interleave(size, dim=-1), damping
    )
    torch.testing.assert_close(of_groups.value(), of_entries.value())
