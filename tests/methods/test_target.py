"""How many entries go at each step, against counts and thresholds worked out slowly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods._target import Target
from torchprune_bayes.types import Masks, Scores

PATHS = st.sampled_from(["cubic", "geometric", "linear"])


def random_case(sizes: list[int], share: float, seed: int) -> tuple[Scores, Masks]:
    generator = torch.Generator().manual_seed(seed)
    scores = {f"{i}": torch.randn(n, generator=generator) for i, n in enumerate(sizes)}
    masks = {name: torch.rand(len(s), generator=generator) < share for name, s in scores.items()}
    return scores, masks


CASES = st.builds(
    random_case,
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(0, 1000),
)


def count(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@given(case=CASES, amount=st.floats(0, 0.99), steps=st.integers(1, 5), path=PATHS)
@settings(deadline=None)
def test_steps_end_at_the_exact_count(case, amount, steps, path):
    scores, masks = case
    target = Target(masks, amount, steps=steps, path=path)
    now = masks
    for step in range(steps):
        then, now = now, target.keep(step, scores, now)
        assert not any((now[name] & ~then[name]).any() for name in now)
    assert count(now) == count(masks) - round(amount * count(masks))
    kept = torch.cat([scores[name][now[name]] for name in masks])
    gone = torch.cat([scores[name][masks[name] & ~now[name]] for name in masks])
    assert not len(kept) or not len(gone) or gone.max() <= kept.min()


@given(case=CASES, amount=st.floats(0, 1))
@settings(deadline=None)
def test_a_scope_of_layers_takes_the_share_of_each(case, amount):
    scores, masks = case
    kept = Target(masks, amount, scope="layer").keep(0, scores, masks)
    for name, mask in masks.items():
        remaining = int(mask.sum())
        assert int(kept[name].sum()) == remaining - round(amount * remaining)


def test_counts():
    scores, masks = random_case([10, 10], 1.0, 0)
    assert count(Target(masks, 7).keep(0, scores, masks)) == 13
    assert count(Target(masks, 20, steps=1).keep(0, scores, masks)) == 0
    with pytest.raises(ArgumentError, match="at most 20"):
        Target(masks, 21).keep(0, scores, masks)


def test_nothing_left_is_nothing_to_prune():
    scores, masks = random_case([10], 0.0, 0)
    for amount in (0.5, 0):
        assert count(Target(masks, amount).keep(0, scores, masks)) == 0
    costs = {"0": 2.0}
    target = Target(masks, 0.0, costs=costs, flops_target=0.0, steps=3)
    assert count(target.keep(1, scores, masks)) == 0


def strict_slowly(scores: Tensor, masks: Tensor, sparsity: float) -> Tensor:
    """Keep ``score > t``, ``t`` the ``ceil(n(1−s))``-th largest, masked scores being zero."""
    statistic = torch.where(masks, scores, 0.0)
    k = math.ceil(len(scores) * (1 - sparsity))
    threshold = statistic.sort(descending=True).values[k - 1]
    return (statistic > threshold) & masks


@given(size=st.integers(1, 60), sparsity=st.floats(0.001, 0.999), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_the_papers_threshold_with_its_own_fraction(size, sparsity, seed):
    scores, masks = random_case([size], 1.0, seed)
    scores = {"0": scores["0"].abs()}
    kept = Target(masks, sparsity, strict=True).keep(0, scores, masks)
    assert torch.equal(kept["0"], strict_slowly(scores["0"], masks["0"], sparsity))


def test_the_papers_threshold_on_a_pruned_tensor_counts_the_whole():
    scores = {"w": torch.arange(1.0, 11.0)}
    masks = {"w": torch.arange(10) >= 2}
    kept = Target(masks, 0.5, strict=True).keep(0, scores, masks)
    # Half of the 8 remaining entries are 4, so 6 of 10 are to go; the strict rule takes one more.
    assert torch.equal(kept["w"], strict_slowly(scores["w"], masks["w"], 0.6))
    assert count(kept) == 3


@given(case=CASES, share=st.floats(0, 1), steps=st.integers(1, 4), seed=st.integers(0, 99))
@settings(deadline=None)
def test_flops_end_just_within_the_budget(case, share, steps, seed):
    scores, masks = case
    costs = {name: float(1 + (seed + i) % 5) for i, name in enumerate(masks)}
    target = Target(masks, 0.0, steps=steps, costs=costs, flops_target=share)
    now = masks
    for step in range(steps):
        then, now = now, target.keep(step, scores, now)
        assert not any((now[name] & ~then[name]).any() for name in now)
    flops = {name: costs[name] * int(mask.sum()) for name, mask in now.items()}
    budget = share * sum(costs[name] * len(mask) for name, mask in masks.items())
    assert sum(flops.values()) <= budget
    gone = {name: masks[name] & ~now[name] for name in masks}
    if count(gone):
        last = max(gone, key=lambda name: max(scores[name][gone[name]].tolist(), default=-math.inf))
        assert sum(flops.values()) + costs[last] > budget


@pytest.mark.parametrize(("size", "share", "left"), [(5, 0.2, 1), (10, 0.2, 2), (25, 0.44, 11)])
def test_flops_budgets_met_exactly_are_not_missed_by_rounding(size, share, left):
    scores, masks = random_case([size], 1.0, 0)
    target = Target(masks, 0.0, steps=2, costs={"0": 1.0}, flops_target=share)
    halfway = target.keep(0, scores, masks)
    assert count(target.keep(1, scores, halfway)) == left
