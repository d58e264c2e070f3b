"""Least squares of a linear map on some of its inputs, from the first two moments of all of them.

In plain words: what a layer read from inputs that are removed is predicted, as well as a linear
function can, from the inputs that stay, and this prediction is added to their weights. This is the
regression of channel pruning (He, Zhang and Sun, 2017, https://arxiv.org/abs/1707.06168) and the
optimal brain surgeon on a layer's own squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import safe_cholesky
from torchprune_bayes._numerics.precision import float64_device, wide

_BLOCK = 256
_ROUNDING = 1e-13
_DAMPINGS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass
class Moments:
    """Number, sum and products of vectors that are seen a few at a time.

    Attributes:
        count: Vectors seen.
        total: Their sum, float64 ``[d]``.
        products: ``Σ x xᵀ``, float64 ``[d, d]``.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> Moments:
        """Moments of nothing, for vectors of so many entries."""
        place = {"dtype": torch.float64, "device": float64_device(device)}
        return cls(0, torch.zeros(size, **place), torch.zeros(size, size, **place))  # type: ignore[call-overload]

    def add(self, rows: Tensor) -> None:
        """Count ``[n, d]`` vectors in."""
        rows = wide(rows)
        self.count += len(rows)
        self.total += rows.sum(0)
        for start in range(0, rows.shape[1], _BLOCK):  # above the diagonal, and mirrored
            stop = start + _BLOCK
            part = rows[:, start:stop].T @ rows[:, start:]
            self.products[start:stop, start:] += part
            self.products[stop:, start:stop] += part[:, _BLOCK:].T

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    def of(self, entries: Tensor) -> Moments:
        """Moments of some entries of the vectors, boolean ``[d]``."""
        if bool(entries.all()):
            return self
        where = entries.nonzero()[:, 0]
        products = self.products.index_select(0, where).index_select(1, where)
        return Moments(self.count, self.total[where], products)

    def among(self, entries: Tensor) -> Moments:
        """Moments of vectors with further entries that are always zero.

        Args:
            entries: Boolean, true for the present entries.
        """
        result = Moments.zeros(len(entries), self.total.device)
        where = entries.nonzero()[:, 0].to(self.total.device)
        result.count = self.count
        result.total[where] = self.total
        result.products[where[:, None], where] = self.products
        return result

    def mean(self) -> Tensor:
        """Mean vector ``[d]``."""
        return self.total / max(self.count, 1)

    def second(self, *, centred: bool) -> Tensor:
        """Mean of ``x xᵀ``, or the covariance.

        Of inputs that hardly vary around a large mean the difference is rounding, and need not be
        positive; as much as that is added to the variances.
        """
        moment = self.products / max(self.count, 1)
        if not centred:
            return moment
        rounding = _ROUNDING * moment.diagonal().mean()
        moment = moment - torch.outer(self.mean(), self.mean())
        moment.diagonal().add_(rounding)
        return moment


@dataclass(frozen=True)
class Fit:
    """Result of a least squares fit.

    Attributes:
        weight: ``[o, d]`` float64, zero for inputs that go.
        shift: What is added to the bias, ``[o]`` float64; zeros where there is none to add to.
        cut_error: Mean squared change of the outputs if the inputs are cut off and the bias takes
            over the mean of what leaves; nothing is taken over where there is no bias.
        error: The same after the fit.
        damping: Ridge, relative to the mean variance of the inputs that stay.
    """

    weight: Tensor
    shift: Tensor
    cut_error: float
    error: float
    damping: float


def least_squares(
    weight: Tensor,
    keep: Tensor,
    halves: tuple[Moments, Moments],
    *,
    intercept: bool,
    damping: float | str = "auto",
) -> Fit:
    """Fit the outputs of a linear map on the inputs that stay.

    Minimises the mean of ``|Wx + b - W'x_K - b'|² + λ|W' - W_K|²``, which gives
    ``W' = W_K + W_Z G_ZK (G_KK + λI)⁻¹`` with the covariance ``G`` of the inputs, or with their
    mean products where there is no bias to fit.

    Args:
        weight: ``W``, ``[o, d]``.
        keep: Boolean ``[d]``, true for the inputs ``K`` that stay, false for ``Z``.
        halves: Moments of two halves of the inputs.
        intercept: Whether the bias is fitted as well.
        damping: ``λ`` relative to the mean diagonal of ``G_KK``; ``"auto"`` takes the one of five
            values with the smallest error when each half is fitted and the other one predicted.

    Returns:
        The fit.

    Raises:
        NumericalError: If the inputs are not finite.

    Cost: ``k³/3 + 2 o k²`` for ``k`` inputs that stay, and ``o d²``; for ``"auto"`` ten times the
    former more.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [5.0, 10.0]])
        >>> halves = Moments.zeros(2, x.device), Moments.zeros(2, x.device)
        >>> halves[0].add(x[:2]), halves[1].add(x[2:])
        (None, None)
        >>> keep = torch.tensor([True, False])
        >>> fit = least_squares(torch.ones(1, 2), keep, halves, intercept=True)
        >>> fit.weight.round(decimals=4)
        tensor([[3., 0.]], dtype=torch.float64)
    """
    weight = wide(weight)
    whole = halves[0] + halves[1]
    second = whole.second(centred=intercept)
    if isinstance(damping, str):
        damping = _best_damping(weight, keep, halves, intercept)
    moved = weight * keep
    moved[:, keep] += _Regression.of(weight, keep, second).change(damping)
    shift = (weight - moved) @ whole.mean() if intercept else weight.new_zeros(len(weight))
    return Fit(
        weight=moved,
        shift=shift,
        cut_error=_error(weight * ~keep, second),
        error=_error(weight - moved, second),
        damping=damping,
    )


class Refit(NamedTuple):
    """A fit of :class:`Refits`.

    Attributes:
        weight: ``[o, d]``, zero for inputs that go.
        shift: What is added to the bias, ``[o]``; zeros where there is none.
        second: Mean square of each output without its bias, ``[o]``; its variance where the moments
            are centred.
    """

    weight: Tensor
    shift: Tensor
    second: Tensor


class Refits:
    """Many fits of one linear map as :func:`least_squares`, each on other inputs.

    With ``R = W G`` the normal equations are ``W' (G_KK + λI) = R_K + λ W_K``, and the mean square
    of an output is ``w' G w'ᵀ = Σ_K w' (R_K + λ (w - w'))``. So for each fit only factorisation
    and solution remain to be done.

    Args:
        weight: ``W``, ``[o, d]`` float64.
        mean: Mean of the inputs ``[d]``; ``None`` where there is no bias to fit.
        second: Their covariance ``[d, d]``, or their mean products where there is no bias.

    Cost: ``o d²``, and ``k³/3 + 2 o k²`` for a fit on ``k`` inputs.

    Example:
        >>> fits = Refits(torch.ones(1, 2).double(), None, torch.ones(2, 2).double())
        >>> fits.without(torch.tensor([True, False]), 1e-9).weight.round(decimals=4)
        tensor([[2., 0.]], dtype=torch.float64)
    """

    def __init__(self, weight: Tensor, mean: Tensor | None, second: Tensor) -> None:
        self._weight, self._mean, self._second = weight, mean, second
        self._read = weight @ second

    def mean_squares(self) -> Tensor:
        """Of the outputs without their bias, ``[o]``, with all inputs."""
        return (self._weight * self._read).sum(1)

    def without(self, keep: Tensor, damping: float) -> Refit:
        """Fit on the inputs that stay, boolean ``[d]``."""
        where = keep.nonzero()[:, 0]
        weight, target = self._weight[:, where], self._read[:, where]
        inner = self._second.index_select(0, where).index_select(1, where)
        ridge = damping * float(inner.diagonal().mean()) if len(where) else 0.0
        fitted = weight
        if ridge > 0.0:  # inputs that never vary predict nothing
            target = target + ridge * weight
            inner.diagonal().add_(ridge)
            fitted = torch.cholesky_solve(target.T, safe_cholesky(inner)).T
        second = (fitted * (target - ridge * fitted)).sum(1).clamp_min(0.0)
        moved = torch.zeros_like(self._weight).index_copy_(1, where, fitted)
        shift = weight.new_zeros(len(weight))
        if self._mean is not None:
            shift = (self._weight - moved) @ self._mean
        return Refit(moved, shift, second)


def _error(difference: Tensor, second: Tensor) -> float:
    return max(float(((difference @ second) * difference).sum()), 0.0)


@dataclass(frozen=True)
class _Regression:
    """What is read from ``Z``, and how the inputs that stay predict it.

    Attributes:
        inner: ``G_KK``, ``[k, k]``.
        target: ``G_KZ W_Zᵀ``, ``[k, o]``.
        power: Mean square of what is read from ``Z``, ``tr W_Z G_ZZ W_Zᵀ``.
    """

    inner: Tensor
    target: Tensor
    power: float

    @classmethod
    def of(
        cls, weight: Tensor, keep: Tensor, second: Tensor, *, with_power: bool = False
    ) -> _Regression:
        gone, lost = second[:, ~keep], weight[:, ~keep]
        power = _error(lost, gone[~keep]) if with_power else 0.0
        return cls(second[keep][:, keep], gone[keep] @ lost.T, power)

    def change(self, damping: float) -> Tensor:
        """``W_Z G_ZK (G_KK + λI)⁻¹``, ``[o, k]``."""
        scale = float(self.inner.diagonal().mean()) if len(self.inner) else 0.0
        if scale <= 0.0:  # inputs that never vary predict nothing
            return torch.zeros_like(self.target.T)
        damped = self.inner.clone()
        damped.diagonal().add_(damping * scale)
        return torch.cholesky_solve(self.target, safe_cholesky(damped)).T

    def error(self, change: Tensor) -> float:
        """Mean squared error of a prediction."""
        cross = float((change * self.target.T).sum())
        return self.power - 2.0 * cross + _error(change, self.inner)


def _best_damping(
    weight: Tensor, keep: Tensor, halves: tuple[Moments, Moments], intercept: bool
) -> float:
    if not halves[0].count or not halves[1].count:
        return _DAMPINGS[-1]
    both = [
        _Regression.of(weight, keep, half.second(centred=intercept), with_power=True)
        for half in halves
    ]
    errors = [
        sum(unseen.error(fitted.change(damping)) for fitted, unseen in (both, both[::-1]))
        for damping in _DAMPINGS
    ]
    return _DAMPINGS[errors.index(min(errors))]
