"""Counts of pruning in steps, and the floor under each tensor."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprune_bayes.methods.stepwise import ranked_groups, smallest_k_with_floor


@given(
    entries=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    amounts=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    scope=st.sampled_from(["global", "layer"]),
)
@settings(max_examples=50, derandomize=True)
def test_goals_never_fall_and_end_at_the_count(entries, amounts, scope):
    remaining = {str(i): torch.ones(n).bool() for i, n in enumerate(entries)}
    for amount in amounts:
        before = sum(int(mask.sum()) for mask in remaining.values())
        groups = ranked_groups(remaining, amount, scope, lambda final, _: [final / 2, final])
        assert all(group.goals == sorted(group.goals) for group in groups)
        expected = {
            "global": round(amount * before),
            "layer": sum(round(amount * int(mask.sum())) for mask in remaining.values()),
        }
        assert sum(group.goals[-1] for group in groups) == expected[scope]
        for group in groups:
            masks = [remaining[name] for name in group.names]
            kept = smallest_k_with_floor([m.double() for m in masks], group.goals[-1], masks, 0)
            remaining |= dict(zip(group.names, kept, strict=True))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    share=st.floats(0, 1),
    floor=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, derandomize=True)
def test_the_floor_holds_as_far_as_the_count_allows(sizes, share, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(5, (n,), generator=generator).double() for n in sizes]
    remaining = [torch.rand(n, generator=generator) < 0.8 for n in sizes]
    before = sum(int(mask.sum()) for mask in remaining)
    k = round(share * before)
    kept = smallest_k_with_floor(scores, k, remaining, floor)
    assert sum(int(mask.sum()) for mask in kept) == before - k
    assert not any((new & ~old).any() for new, old in zip(kept, remaining, strict=True))
    floors = [min(floor, int(mask.sum())) for mask in remaining]
    if sum(floors) <= before - k:
        assert all(int(mask.sum()) >= least for mask, least in zip(kept, floors, strict=True))
    for score, new, old in zip(scores, kept, remaining, strict=True):
        if new.any() and (old & ~new).any():
            assert score[new].min() >= score[old & ~new].max()
