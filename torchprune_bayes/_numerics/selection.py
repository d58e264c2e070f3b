"""Which entries to prune: exactly as many as asked, without sorting or joining the scores.

The threshold is found by radix selection from the leading digit. Read as integers, the bits of
floats are in the order of the floats once those of negative floats are flipped. A histogram over
the leading 12 bits of these *keys* tells in which bin the threshold lies, the next one tells
where in that bin, and so on. The keys of a bin that holds few are copied, so that only the first
histogram reads all scores. To prune ``k`` entries is to free a cost of ``k`` where each entry costs
1, so counts and budgets share one code path; costs are summed as :class:`~fractions.Fraction`,
without rounding.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import repeat
from typing import cast

import torch
from torch import Tensor

from torchprune_bayes._checks import check_count, check_fraction
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError

_DIGIT_BITS = 12
_BINS = 1 << _DIGIT_BITS
_FEW = 8  # a bin with less than this part of all keys is copied
# Entries processed at a time. On the CPU a chunk stays in the cache and is small enough for torch
# not to wake its thread pool, whose barriers are slow where cores are shared.
_CHUNK_ON_CPU = 1 << 15
_CHUNK_ELSEWHERE = 1 << 22


@torch.no_grad()
def smallest_k(
    scores: Sequence[Tensor], k: int, remaining: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Prune the ``k`` remaining entries with the smallest scores, over all tensors.

    Ties go by index: the entry that comes first, in list order and then row by row, is pruned
    first. ``-0.0`` equals ``0.0``, infinite scores are ordered like numbers, and scores of
    different dtypes are compared in one that holds them all.

    Time is linear: five reads of scores that are spread out, nine of scores of which more than an
    eighth agrees in its leading bits. Memory is that of the masks, an eighth of the scores' and, on
    the CPU, a few MB; a non-contiguous tensor is copied while it is read.

    Args:
        scores: Importance scores of any real dtypes, shapes and memory formats, on one device.
        k: How many of the remaining entries to prune.
        remaining: Boolean tensors shaped like ``scores``, ``False`` where an entry is pruned
            already; ``None`` if none is. Scores of pruned entries have no effect.

    Returns:
        Boolean masks shaped like ``scores``, ``True`` keeps; ``False`` where pruned already.

    Raises:
        ArgumentError: If ``k`` is negative or larger than the number of remaining entries, a
            score of one is NaN, or the tensors do not match.
        ArgumentTypeError: If ``k`` is no int, a score complex or a remaining mask not boolean.

    Example:
        >>> smallest_k([torch.tensor([0.3, 0.1]), torch.tensor([0.1, 0.2])], k=2)
        [tensor([ True, False]), tensor([False,  True])]
    """
    check_count("k", k, minimum=0)
    pools = _pools(scores, remaining)
    left = sum(_counts(pools))
    if k > left:
        raise ArgumentError(f"Expected `k` of at most {left}, the number of entries left, got {k}.")
    return _free(pools, Fraction(int(k)))


@torch.no_grad()
def within_budget(
    scores: Sequence[Tensor],
    costs: Sequence[float],
    budget: float,
    remaining: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Prune the smallest scores first until what is kept costs at most ``budget``.

    No more entries are pruned than that takes, and ties go by index as in :func:`smallest_k`.
    An entry that costs nothing is still pruned when its turn comes. Time and memory are
    those of :func:`smallest_k`.

    Args:
        scores: Importance scores of any real dtypes, shapes and memory formats, on one device.
        costs: What one entry of each tensor costs, e.g. its FLOPs; finite and not negative.
        budget: What all kept entries may cost in total, in the unit of ``costs``.
        remaining: Boolean tensors shaped like ``scores``, ``False`` where an entry is pruned
            already; ``None`` if none is. Pruned entries cost nothing.

    Returns:
        Boolean masks shaped like ``scores``, ``True`` keeps; ``False`` where pruned already.

    Raises:
        ArgumentError: If the budget or a cost is negative or not finite, a remaining score is NaN,
            or the tensors do not match.
        ArgumentTypeError: If a score is complex or a remaining mask not boolean.

    Example:
        >>> within_budget([torch.tensor([1.0, 4.0]), torch.tensor([2.0, 3.0])], [10, 1], 11)
        [tensor([False,  True]), tensor([False,  True])]
    """
    for name, value in [("budget", budget), *(("costs", cost) for cost in costs)]:
        if not 0.0 <= value < math.inf:
            raise ArgumentError(f"Expected `{name}` to be finite and at least 0, got {value!r}.")
    pools = _pools(scores, remaining, costs)
    spent = sum(pool.cost * count for pool, count in zip(pools, _counts(pools), strict=True))
    return _free(pools, spent - Fraction(budget))


@torch.no_grad()
def keep_strictly_above(
    scores: Sequence[Tensor], sparsity: float, remaining: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Keep what is strictly above the ``ceil(n * (1 - sparsity))``-th largest of ``n`` scores.

    The rule of the published WoodFisher and CBS code, for masks equal to theirs: it prunes one
    entry more than asked and all that tie with it, where :func:`smallest_k` is exact. Where the
    rule has no threshold, ``sparsity`` 0 keeps every remaining entry and 1 prunes all. Time as
    :func:`smallest_k`; with ``remaining`` the scores are copied once.

    Args:
        scores: Importance scores of any real dtypes, shapes and memory formats, on one device.
        sparsity: Fraction of all ``n`` entries to prune, those pruned already included.
        remaining: Boolean tensors shaped like ``scores``, ``False`` where an entry is pruned
            already, which then takes part with score 0; ``None`` if none is.

    Returns:
        Boolean masks shaped like ``scores``, ``True`` keeps; ``False`` where pruned already.

    Raises:
        ArgumentError: If ``sparsity`` is outside [0, 1], a remaining score is NaN, or the
            tensors do not match.
        ArgumentTypeError: If a score is complex or a remaining mask not boolean.

    Example:
        >>> keep_strictly_above([torch.tensor([1.0, 2.0, 3.0, 4.0])], sparsity=0.5)
        [tensor([False, False, False,  True])]
    """
    check_fraction("sparsity", sparsity)
    pools = _pools(scores, remaining)
    n = sum(score.numel() for score in scores)
    rank = math.ceil(n * (1 - sparsity))
    if sparsity == 0 or rank == 0:
        return _free(pools, Fraction(n if sparsity else 0))
    filled = [
        p.score if p.remaining is None else p.score.masked_fill(~p.remaining, 0) for p in pools
    ]
    threshold, _ = _threshold(_pools(filled, None), Fraction(n - rank + 1))
    return _masks(pools, threshold, rest=Fraction(n))


@dataclass(frozen=True)
class _Pool:
    """The entries of one tensor, and what pruning one of them frees."""

    score: Tensor
    remaining: Tensor | None
    cost: Fraction
    dtype: torch.dtype  # in which all pools are compared

    def has_nan(self) -> Tensor:
        """Whether a remaining score is NaN, still on the device."""
        largest = [
            (part if mask is None else part.masked_fill(~mask, 0)).amax()  # NaN is largest
            for part, mask in self.chunks()
            if len(part)
        ]
        none = torch.zeros((), dtype=torch.bool, device=self.score.device)
        return torch.stack(largest).isnan().any() if largest else none

    def chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Cut scores and remaining mask into flat chunks, in index order."""
        masks = repeat(None) if self.remaining is None else _split(self.remaining)
        return zip(_split(self.score), masks)  # noqa: B905  # `repeat` has no end

    def keys_between(self, low: int, high: int) -> _Pool:
        """The remaining keys from ``low`` to ``high``, copied, as a pool."""
        inside_keys = []
        for part, mask in self.chunks():
            keys = _keys(part, self.dtype)
            inside = (keys >= low) & (keys <= high)
            inside_keys.append(keys[inside if mask is None else inside & mask])
        return replace(
            self, score=torch.cat(inside_keys), remaining=None, dtype=inside_keys[0].dtype
        )


def _free(pools: Sequence[_Pool], target: Fraction) -> list[Tensor]:
    """Prune the smallest scores until their costs sum to ``target``, or all are pruned."""
    threshold, freed = _threshold(pools, target)
    return _masks(pools, threshold, rest=target - freed)


def _threshold(pools: Sequence[_Pool], target: Fraction) -> tuple[int, Fraction]:
    """Find the smallest key up to which entries cost ``target``, and what those below do."""
    bits, entries = 8 * pools[0].dtype.itemsize, sum(pool.score.numel() for pool in pools)
    low, freed, left_out = -(1 << bits >> 1), Fraction(0), Fraction(0)
    for shift in (*range(bits - _DIGIT_BITS, 0, -_DIGIT_BITS), 0):
        counts = _cumulative_counts(pools, low, shift)
        cost_through = partial(_cost_through, counts, left_out)
        bin_ = bisect_left(range(_BINS - 1), target, key=cost_through)
        freed = cost_through(bin_ - 1) if bin_ else freed
        low += bin_ << shift
        if shift and bin_ < _BINS - 1 and _FEW * _number_in(counts, bin_) < entries:
            pools = [pool.keys_between(low, low + (1 << shift) - 1) for pool in pools]
            entries, left_out = 0, freed  # those below cost that; what is left is few enough
    return low, freed


def _cost_through(counts: dict[Fraction, list[int]], left_out: Fraction, bin_: int) -> Fraction:
    """Sum the costs of all remaining keys up to the end of a bin."""
    return sum((cost * count[bin_] for cost, count in counts.items()), left_out)


def _number_in(counts: dict[Fraction, list[int]], bin_: int) -> int:
    """The number of remaining keys in a bin; in the first one also of those below it."""
    return sum(count[bin_] - (count[bin_ - 1] if bin_ else 0) for count in counts.values())


def _cumulative_counts(pools: Sequence[_Pool], low: int, shift: int) -> dict[Fraction, list[int]]:
    """Count, per distinct cost, the remaining keys up to the end of each bin.

    The bins start at ``low`` and are ``2**shift`` wide. Keys below them count in the first, as
    they do in all cumulative counts. Keys above count in the last, as do pruned entries:
    its count is never needed, as it holds the threshold when no other bin does.
    """
    bits = 8 * pools[0].dtype.itemsize
    high = min(low + (_BINS << shift), 1 << (bits - 1)) - 1
    device = pools[0].score.device
    counts = {pool.cost: torch.zeros(_BINS, dtype=torch.int64, device=device) for pool in pools}
    for pool in pools:
        for part, remaining in pool.chunks():
            keys = _keys(part, pool.dtype)
            if remaining is not None:
                keys = keys.masked_fill(~remaining, high)
            digits = (keys.clamp(low, high) >> shift) - (low >> shift)
            counts[pool.cost] += torch.bincount(digits, minlength=_BINS)
    return {cost: count.cpu().cumsum(0).tolist() for cost, count in counts.items()}


def _masks(pools: Sequence[_Pool], threshold: int, rest: Fraction) -> list[Tensor]:
    """Prune remaining keys below ``threshold``, then those equal to it until ``rest`` is freed."""
    masks = []
    tied = iter(_ties(pools, threshold) if rest > 0 else [])
    for pool in pools:
        out = torch.empty(pool.score.shape, dtype=torch.bool, device=pool.score.device)
        for (part, remaining), keep in zip(pool.chunks(), _split(out), strict=True):
            count = next(tied, 0)
            keys = _keys(part, pool.dtype)
            torch.ge(keys, threshold, out=keep)
            if remaining is not None:
                keep &= remaining
            if rest > 0 and count:
                ties = keep & (keys == threshold)
                pruned = min(math.ceil(rest / pool.cost), len(ties)) if pool.cost else len(ties)
                keep &= ~ties | (ties.cumsum(0) > pruned)
                rest -= pool.cost * min(pruned, count)
        masks.append(out)
    return masks


def _counts(pools: Sequence[_Pool]) -> list[int]:
    """Remaining entries of each pool, in one read from the device."""
    if pools[0].remaining is None:
        return [pool.score.numel() for pool in pools]
    counts: list[int] = torch.stack(
        [torch.count_nonzero(cast(Tensor, pool.remaining)) for pool in pools]
    ).tolist()
    return counts


def _ties(pools: Sequence[_Pool], threshold: int) -> list[int]:
    """Remaining keys equal to the threshold in every chunk, in one read."""
    tied = []
    for pool in pools:
        for part, remaining in pool.chunks():
            ties = _keys(part, pool.dtype) == threshold
            tied.append(torch.count_nonzero(ties if remaining is None else ties & remaining))
    counts: list[int] = torch.stack(tied).tolist()
    return counts


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor into flat chunks: views of it if it is contiguous."""
    size = _CHUNK_ON_CPU if tensor.device.type == "cpu" else _CHUNK_ELSEWHERE
    return tensor.reshape(-1).split(size)


def _keys(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Map numbers to integers in the same order, int32 for float32 and int64 for the others."""
    values = values.to(dtype)
    if not dtype.is_floating_point:
        return values
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    bits = (values + 0.0).view(integer)  # -0.0 + 0.0 is 0.0: both zeros get one key
    sign = bits >> (8 * dtype.itemsize - 1)  # -1 where negative, else 0
    return bits.bitwise_xor_(sign.bitwise_and_(torch.iinfo(integer).max))


def _common_dtype(scores: Sequence[Tensor]) -> torch.dtype:
    """Find the dtype to compare in; float64 where floats meet integers."""
    dtypes = {score.dtype for score in scores}
    if not any(dtype.is_floating_point for dtype in dtypes):
        return torch.int64
    narrow = all(dtype.is_floating_point and dtype.itemsize <= 4 for dtype in dtypes)
    return torch.float32 if narrow else torch.float64


def _pools(
    scores: Sequence[Tensor],
    remaining: Sequence[Tensor] | None,
    costs: Sequence[float] | None = None,
) -> list[_Pool]:
    """Check that the tensors match and that no remaining score is NaN, and pair them up."""
    _check_tensors(scores, remaining or [])
    masks = [None] * len(scores) if remaining is None else remaining
    values = [1] * len(scores) if costs is None else costs
    for name, per_tensor in [("remaining", masks), ("costs", values)]:
        if len(per_tensor) != len(scores):
            raise ArgumentError(
                f"Expected {len(scores)} `{name}` like `scores`, got {len(per_tensor)}."
            )
    dtype = _common_dtype(scores)
    pools = [
        _Pool(score, mask, Fraction(cost), dtype)
        for score, mask, cost in zip(scores, masks, values, strict=True)
    ]
    for pool in pools:
        shape = tuple(pool.score.shape)
        if pool.remaining is not None and pool.remaining.shape != shape:
            raise ArgumentError(
                f"Expected `remaining` of shape {shape}, got {tuple(pool.remaining.shape)}."
            )
    nan = torch.stack([pool.has_nan() for pool in pools]).tolist()
    for pool in [pool for pool, has_nan in zip(pools, nan, strict=True) if has_nan]:
        shape = tuple(pool.score.shape)
        raise ArgumentError(f"Expected no NaN in `scores`, got one in shape {shape}.")
    return pools


def _check_tensors(scores: Sequence[Tensor], remaining: Sequence[Tensor]) -> None:
    """Refuse tensors on different devices and of dtypes that have no order."""
    devices = sorted({str(tensor.device) for tensor in [*scores, *remaining]})
    if len(devices) != 1:
        names = ", ".join(devices) or "no tensors"
        raise ArgumentError(f"Expected `scores` and `remaining` on one device, got {names}.")
    for score in scores:
        if score.is_complex():
            raise ArgumentTypeError(f"Expected real `scores`, got {score.dtype}.")
    for mask in remaining:
        if mask.dtype != torch.bool:
            raise ArgumentTypeError(f"Expected boolean tensors in `remaining`, got {mask.dtype}.")
