"""Selection against a twin that sorts plain Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import chain
from typing import TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune

from torchprune_bayes._numerics.selection import keep_strictly_above, smallest_k, within_budget
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError

Case: TypeAlias = tuple[list[Tensor], list[Tensor] | None]

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTS = [torch.int32, torch.int64, torch.uint8, torch.bool]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1),
    "strided": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "channels_last": lambda t: t[None, ..., None].contiguous(memory_format=torch.channels_last),
    "scalar": lambda t: t.flatten()[0] if t.numel() else t,
}


def flat(tensors: list[Tensor]) -> list[float]:
    return list(chain.from_iterable(t.flatten().tolist() for t in tensors))


def in_order_of_pruning(scores: list[Tensor], remaining: list[Tensor] | None) -> list[int]:
    values = flat(scores)
    taking_part = [True] * len(values) if remaining is None else flat(remaining)
    return sorted((i for i in range(len(values)) if taking_part[i]), key=lambda i: values[i])


def slow_masks(order: list[int], count: int, size: int) -> list[bool]:
    kept = set(order[count:])
    return [i in kept for i in range(size)]


@st.composite
def score_lists(draw: st.DrawFn) -> Case:
    """Draw score tensors that often tie, in mixed layouts and dtypes, maybe masked."""
    dtypes = draw(st.sampled_from([FLOATS, INTS, [torch.float32], FLOATS + INTS]))
    few = [-math.inf, -2.0, -0.5, -0.0, 0.0, 1e-40, 0.5, 1.0, math.inf]
    floats = st.one_of(st.sampled_from(few), st.floats(allow_nan=False))
    scores = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(dtypes))
        low = -3 if dtype.is_signed else 0
        values = floats if dtype.is_floating_point else st.integers(low, 3)
        rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        entries = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
        double = torch.tensor(entries, dtype=torch.float64).view(rows, columns)
        layout = draw(st.sampled_from(sorted(LAYOUTS)))
        scores.append(LAYOUTS[layout](double.to(dtype)))
    if draw(st.booleans()):
        return scores, None
    bits = draw(st.randoms(use_true_random=False))
    remaining = [torch.tensor([bits.random() < 0.7 for _ in range(s.numel())]) for s in scores]
    return scores, [mask.bool().view(s.shape) for mask, s in zip(remaining, scores, strict=True)]


@settings(deadline=None)
@given(score_lists(), st.data())
def test_smallest_k_prunes_what_a_stable_sort_puts_first(case: Case, data: st.DataObject) -> None:
    scores, remaining = case
    order = in_order_of_pruning(scores, remaining)
    k = data.draw(st.integers(0, len(order)))

    masks = smallest_k(scores, k, remaining)

    assert flat(masks) == slow_masks(order, k, len(flat(scores)))
    assert [m.shape for m in masks] == [s.shape for s in scores]
    assert all(m.dtype == torch.bool for m in masks)


@settings(deadline=None)
@given(score_lists(), st.data())
def test_within_budget_prunes_the_fewest_that_meet_the_budget(
    case: Case, data: st.DataObject
) -> None:
    scores, remaining = case
    order = in_order_of_pruning(scores, remaining)
    cost = st.one_of(st.sampled_from([0.0, 1.0, 0.1, 3e9]), st.floats(0, 1e12))
    costs = data.draw(st.lists(cost, min_size=len(scores), max_size=len(scores)))
    owner = [Fraction(c) for c, s in zip(costs, scores, strict=True) for _ in range(s.numel())]
    total = sum(owner[i] for i in order)
    budget = data.draw(st.floats(0, max(1.0, 1.1 * float(total))))

    count = 0
    while total > Fraction(budget):
        total -= owner[order[count]]
        count += 1

    masks = within_budget(scores, costs, budget, remaining)
    assert flat(masks) == slow_masks(order, count, len(owner))


@settings(deadline=None)
@given(score_lists(), st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)))
def test_keep_strictly_above_follows_the_published_rule(case: Case, sparsity: float) -> None:
    scores, remaining = case
    values = flat(scores)
    before = [True] * len(values) if remaining is None else flat(remaining)
    statistics = [v if b else 0 for v, b in zip(values, before, strict=True)]
    k = math.ceil(len(values) * (1 - sparsity))
    threshold = math.inf if k == 0 else sorted(statistics, reverse=True)[k - 1]

    masks = keep_strictly_above(scores, sparsity, remaining)

    above = [v > threshold or sparsity == 0 for v in values]
    assert flat(masks) == [a and b for a, b in zip(above, before, strict=True)]


@pytest.mark.parametrize("k", [0, 1, 49_999, 150_001, 250_000])
def test_ties_go_by_index_over_pieces_and_tensors(k: int) -> None:
    scores = [torch.zeros(100_000), torch.zeros(500, 300).t()]
    kept = torch.cat([mask.flatten() for mask in smallest_k(scores, k)])
    assert torch.equal(kept, torch.arange(250_000) >= k)


def test_many_pieces_against_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-500, 500, (3, 50_000), generator=generator) / 7
    order = scores.flatten().argsort(stable=True)
    expected = torch.ones(150_000, dtype=torch.bool).index_fill_(0, order[:100_000], False)
    assert torch.equal(smallest_k([scores], 100_000)[0].flatten(), expected)


def test_equals_the_host_where_nothing_ties() -> None:
    scores = torch.randperm(70_000, dtype=torch.int32).view(torch.float32)  # tiny, all different
    host = prune.L1Unstructured(amount=60_000).compute_mask(scores, torch.ones_like(scores))
    assert torch.equal(smallest_k([scores], 60_000)[0], host.bool())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_extreme_values_of_wide_dtypes(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    scores = torch.tensor([info.max, 0, info.min, 1, -1], dtype=dtype)
    for k, kept in enumerate([[0, 1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 3], [0, 3], [0], []]):
        assert smallest_k([scores], k)[0].nonzero().flatten().tolist() == kept


def test_both_zeros_tie() -> None:
    assert smallest_k([torch.tensor([0.0, -0.0])], 1)[0].tolist() == [False, True]


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbouring_floats_are_told_apart(dtype: torch.dtype) -> None:
    one, eps = torch.tensor(1.0, dtype=dtype), torch.finfo(dtype).eps
    assert smallest_k([torch.stack([one + eps, one, one + eps])], 1)[0].tolist() == [1, 0, 1]


def test_integers_meet_floats_without_rounding() -> None:
    masks = smallest_k([torch.tensor([2**24 + 1]), torch.tensor([2.0**24])], 1)
    assert [mask.item() for mask in masks] == [True, False]


def test_budget_is_met_exactly_where_floats_round() -> None:
    # 3 * 0.1 in exact arithmetic is above the double nearest to 0.3
    assert int(within_budget([torch.arange(10.0)], [0.1], 0.3)[0].sum()) == 2


def test_entries_that_cost_nothing_go_in_their_turn() -> None:
    masks = within_budget([torch.tensor([0.0, 2.0, 3.0]), torch.tensor([1.0, 4.0])], [0, 5], 5)
    assert [mask.tolist() for mask in masks] == [[False, True, True], [False, True]]


def test_scores_stay_as_they_are_and_may_require_grad() -> None:
    scores = torch.tensor([-0.0, 2.0, -1.0], requires_grad=True)
    (mask,) = smallest_k([scores], 1)
    assert not mask.requires_grad
    assert torch.equal(
        scores.detach().view(torch.int32), torch.tensor([-0.0, 2.0, -1.0]).view(torch.int32)
    )


def test_nan_counts_only_where_remaining() -> None:
    scores, remaining = torch.tensor([math.nan, 1.0, 0.5]), torch.tensor([False, True, True])
    assert smallest_k([scores], 1, [remaining])[0].tolist() == [False, True, False]
    assert keep_strictly_above([scores], 0.5, [remaining])[0].tolist() == [False, True, False]
    with pytest.raises(ArgumentError, match="Expected no NaN"):
        smallest_k([scores], 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    scores = (torch.randn(300, 1000) * 100).to(dtype)
    remaining = scores.flip(0) > -50
    cpu = smallest_k([scores, scores.t()], 200_000, [remaining, remaining.t()])
    cuda = [scores.cuda(), scores.cuda().t()]
    masks = smallest_k(cuda, 200_000, [remaining.cuda(), remaining.t().cuda()])
    assert all(torch.equal(a, b.cpu()) for a, b in zip(cpu, masks, strict=True))


ONE = [torch.tensor([1.0, 2.0])]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: smallest_k(ONE, 3), ArgumentError, "at most 2"),
        (lambda: smallest_k(ONE, 2, [torch.tensor([True, False])]), ArgumentError, "at most 1"),
        (lambda: smallest_k(ONE, -1), ArgumentError, "`k` of at least 0"),
        (
            lambda: smallest_k(ONE, 0.5),  # type: ignore[arg-type]
            ArgumentTypeError,
            "`k` to be an int",
        ),
        (lambda: smallest_k([], 0), ArgumentError, "no tensors"),
        (lambda: smallest_k([*ONE, torch.empty(1, device="meta")], 1), ArgumentError, "one device"),
        (lambda: smallest_k([torch.tensor([1j])], 1), ArgumentTypeError, "real"),
        (lambda: smallest_k(ONE, 1, [torch.ones(2)]), ArgumentTypeError, "boolean"),
        (lambda: smallest_k(ONE, 1, [torch.ones(1).bool()]), ArgumentError, "shape"),
        (lambda: smallest_k(ONE, 1, []), ArgumentError, "Expected 1 `remaining`"),
        (lambda: within_budget(ONE, [1.0, 2.0], 1.0), ArgumentError, "Expected 1 `costs`"),
        (lambda: within_budget(ONE, [-1.0], 1.0), ArgumentError, "`costs`"),
        (lambda: within_budget(ONE, [math.inf], 1.0), ArgumentError, "`costs`"),
        (lambda: within_budget(ONE, [1.0], -1.0), ArgumentError, "`budget`"),
        (lambda: within_budget(ONE, [1.0], math.nan), ArgumentError, "`budget`"),
        (lambda: keep_strictly_above(ONE, 1.5), ArgumentError, "`sparsity`"),
    ],
)
def test_impossible_requests_are_refused(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
