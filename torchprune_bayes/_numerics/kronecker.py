"""Inverse of a damped Kronecker product, which is never formed.

Legend: ``W [rows, columns]`` a weight matrix; ``R [rows, rows]`` and ``C [columns, columns]`` its
Kronecker factors, symmetric and positive semi-definite, so that ``F = R ⊗ C`` over the row-major
entries of ``W``; ``λ`` damping.

Factored Tikhonov damping (arXiv 1503.05671, section 6.3) replaces ``F + λI`` by
``F_λ = (R + √(λ/π) I) ⊗ (C + √(λπ) I)``, whose inverse is the product of two small inverses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import safe_cholesky
from torchprune_bayes._numerics.precision import wide


class KroneckerInverse:
    """``F_λ⁻¹`` of one weight matrix, held as two Cholesky factors.

    Args:
        rows: ``R``; computed with in float64.
        columns: ``C``, likewise.
        damping: ``λ > 0``.
        pi: Whether ``π`` is the ratio of the mean eigenvalues of ``C`` and ``R``, so that both are
            damped alike; otherwise, and where one of them is zero, ``π = 1``.

    Raises:
        NumericalError: If a factor is not finite, or indefinite beyond rounding.

    Cost: ``(rows³ + columns³)/3`` multiplications to build and ``8(rows² + columns²)`` bytes.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> inverse = KroneckerInverse(15 * one, 3 * one, damping=1.0)
        >>> inverse.diagonal(), inverse.solve(64 * one)  # (15 + 1)(3 + 1) = 64
        (tensor([[0.0156]], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
    """

    def __init__(self, rows: Tensor, columns: Tensor, damping: float, *, pi: bool = False) -> None:
        damped = _damped(rows, columns, damping, pi=pi)
        self._rows, self._columns = (safe_cholesky(matrix) for matrix in damped)

    def diagonal(self) -> Tensor:
        """Diagonal of ``F_λ⁻¹`` as ``[rows, columns]``: ``diag(R⁻¹) diag(C⁻¹)ᵀ``, both damped."""
        rows, columns = (
            torch.cholesky_inverse(factor).diagonal() for factor in (self._rows, self._columns)
        )
        return torch.outer(rows, columns)

    def solve(self, matrix: Tensor) -> Tensor:
        """``F_λ⁻¹ vec(V) = vec(R⁻¹ V C⁻¹)``, both damped, for ``V [rows, columns]``."""
        half = torch.cholesky_solve(matrix.to(self._rows), self._rows)
        return torch.cholesky_solve(half.mT, self._columns).mT


class DiagonalInverse:
    """``(D + λI)⁻¹`` for a diagonal curvature ``D``, with the methods of :class:`KroneckerInverse`.

    Args:
        diagonal: ``D`` as ``[rows, columns]``, not negative.
        damping: ``λ > 0``.

    Example:
        >>> DiagonalInverse(torch.tensor([[1.0, 3.0]]), damping=1.0).diagonal()
        tensor([[0.5000, 0.2500]], dtype=torch.float64)
    """

    def __init__(self, diagonal: Tensor, damping: float) -> None:
        self._inverse = (wide(diagonal) + damping).reciprocal()

    def diagonal(self) -> Tensor:
        """Diagonal of the inverse as ``[rows, columns]``."""
        return self._inverse

    def solve(self, matrix: Tensor) -> Tensor:
        """``(D + λI)⁻¹ vec(V)`` for ``V [rows, columns]``."""
        return self._inverse * matrix.to(self._inverse)


def kronecker_inverses(
    factors: Sequence[tuple[Tensor, Tensor]], damping: float, *, pi: bool = False
) -> list[KroneckerInverse]:
    """One :class:`KroneckerInverse` for each pair of factors.

    Success of the factorisations is read from the device once for all; those that did
    not succeed are repeated as :class:`KroneckerInverse` does it.

    Args:
        factors: Pairs ``R, C``.
        damping: ``λ > 0``.
        pi: See :class:`KroneckerInverse`.

    Raises:
        NumericalError: If a factor is not finite, or indefinite beyond rounding.
    """
    inverses, failures = [], []
    for rows, columns in factors:
        inverse = object.__new__(KroneckerInverse)
        damped = _damped(rows, columns, damping, pi=pi)
        (inverse._rows, first), (inverse._columns, second) = map(torch.linalg.cholesky_ex, damped)
        inverses.append(inverse)
        failures.append((first != 0) | (second != 0))
    failed = torch.stack(failures).tolist() if failures else []
    return [
        KroneckerInverse(*pair, damping, pi=pi) if bad else inverse
        for inverse, pair, bad in zip(inverses, factors, failed, strict=True)
    ]


def _damped(rows: Tensor, columns: Tensor, damping: float, *, pi: bool) -> tuple[Tensor, Tensor]:
    """Both factors with their share of the damping on the diagonal, float64."""
    rows, columns = wide(rows), wide(columns)
    ratio = _mean_eigenvalue_ratio(columns, rows) if pi else rows.new_ones(())
    return (
        _plus_identity(rows, (damping / ratio).sqrt()),
        _plus_identity(columns, (damping * ratio).sqrt()),
    )


def _mean_eigenvalue_ratio(first: Tensor, second: Tensor) -> Tensor:
    above, below = (factor.diagonal().mean() for factor in (first, second))
    return torch.where((above > 0) & (below > 0), above / below, 1.0)


def _plus_identity(matrix: Tensor, shift: Tensor) -> Tensor:
    return matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
