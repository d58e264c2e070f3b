"""Posterior precisions with a Kronecker-factored curvature, ``P = s R ⊗ C + D``.

Legend as in :mod:`~torchprune_bayes._numerics.laplace_blocks`.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from torchprune_bayes._numerics.laplace_blocks import LaplaceBlock, Precision
from torchprune_bayes.errors import NumericalError


class KroneckerBlock(LaplaceBlock):
    """``H = R ⊗ C`` with ``R`` over the rows and ``C`` over the columns of the tensor.

    With ``D = D_r ⊗ D_c``, whitening keeps the form::

        sH + D = D^½ (s R' ⊗ C' + I) D^½,    R' = D_r^−½ R D_r^−½,    C' = D_c^−½ C D_c^−½

    so that with the eigenvalues ``λ'`` and ``μ'`` of these two everything is exact. For any other
    ``D`` only the diagonal of ``QᵀDQ`` is kept, in the eigenbasis ``Q`` of ``H``. By Hadamard's
    inequality the log-determinant is then too large: the log marginal likelihood becomes a lower
    bound.

    Args:
        rows: ``R``, ``[rows, rows]``, symmetric and positive semi-definite.
        columns: ``C``, ``[columns, columns]``, likewise.

    Raises:
        NumericalError: If a factor is not finite.

    Cost: eigendecompositions, ``rows³ + columns³`` once, and once more for each ``D`` that is
    separable and not constant. ``D`` that is constant needs eigenvalues only, until entries of
    the inverse are asked for.

    Example:
        >>> block = KroneckerBlock(torch.eye(2), torch.full((1, 1), 4.0))
        >>> ones = Precision((torch.ones(1, 1, dtype=torch.float64),), (2, 1))
        >>> block.log_det_ratio(ones, scale=0.5).exp()  # det(2I + I)
        tensor(9.0000, dtype=torch.float64)
    """

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self._rows, self._columns = rows.double(), columns.double()
        for factor in (self._rows, self._columns):
            if not torch.isfinite(factor).all():
                raise NumericalError("Expected finite Kronecker factors, got NaN or infinite ones.")
        self.shape = (len(rows), len(columns))

    def diagonal(self) -> Tensor:
        """``diag(R) diag(C)ᵀ``."""
        return torch.outer(self._rows.diagonal(), self._columns.diagonal()).clamp_min(0)

    def spectrum(self) -> Tensor:
        """``λμᵀ``."""
        return torch.outer(*self._values)

    def log_det_ratio(self, precision: Precision, scale: float) -> Tensor:
        """``Σ log(1 + s λ'μ')``, or an upper bound where ``D`` is not separable."""
        separated = precision.separated()
        if separated is not None:
            return torch.log1p(scale * torch.outer(*self._whitened_values(*separated))).sum()
        return self._projected(precision, scale).log().sum() - precision.log_sum()

    def effective_parameters(self, precision: Precision, scale: float) -> Tensor:
        """``γ``, minus the slope of ``log_det_ratio`` by ``log δ``; for a bound maybe negative."""
        if not self.is_exact(precision):
            return 1.0 - precision.dense() * self.variances(precision, scale)
        values, rows, columns = self._whitened(precision)
        ratios = scale * values
        return rows @ (ratios / (1.0 + ratios)) @ columns.mT

    def variances(self, precision: Precision, scale: float) -> Tensor:
        """Diagonal of the inverse; where ``D`` is not separable, of the bound's own precision."""
        if not self.is_exact(precision):
            rows, columns = self._weights
            return rows @ self._projected(precision, scale).reciprocal() @ columns.mT
        values, rows, columns = self._whitened(precision)
        return rows @ (1.0 + scale * values).reciprocal() @ columns.mT / precision.dense()

    def smoothed_precisions(self, precision: Precision, scale: float) -> Tensor:
        """Diagonal of ``Q(sΛ + diag QᵀDQ)Qᵀ``, in which ``D`` is averaged twice."""
        rows, columns = self._weights
        return rows @ self._projected(precision, scale) @ columns.mT

    def is_exact(self, precision: Precision) -> bool:
        """Whether ``D`` is separable."""
        return precision.separated() is not None

    @cached_property
    def _values(self) -> tuple[Tensor, Tensor]:
        return _eigenvalues(self._rows), _eigenvalues(self._columns)

    @cached_property
    def _bases(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return _eigen(self._rows), _eigen(self._columns)

    @cached_property
    def _weights(self) -> tuple[Tensor, Tensor]:
        """``Q_R ∘ Q_R`` and ``Q_C ∘ Q_C``; their rows and columns sum to one."""
        (_, rows), (_, columns) = self._bases
        return rows.square(), columns.square()

    def _projected(self, precision: Precision, scale: float) -> Tensor:
        """``s λμᵀ`` plus the diagonal of ``QᵀDQ``."""
        (row_values, _), (column_values, _) = self._bases
        rows, columns = self._weights
        smoothed = rows.mT @ precision.dense() @ columns
        return scale * torch.outer(row_values, column_values) + smoothed

    def _whitened_values(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        if rows.numel() == columns.numel() == 1:
            return self._values[0] / rows, self._values[1] / columns
        return _eigenvalues(_scaled(self._rows, rows)), _eigenvalues(
            _scaled(self._columns, columns)
        )

    def _whitened(self, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
        """``λ'μ'ᵀ`` and the squares of the eigenvectors of ``R'`` and ``C'``."""
        separated = precision.separated()
        assert separated is not None
        if all(factor.numel() == 1 for factor in separated):
            (rows, _), (columns, _) = self._bases
            return torch.outer(rows, columns) / (separated[0] * separated[1]), *self._weights
        (rows, row_vectors), (columns, column_vectors) = (
            _eigen(_scaled(factor, precisions))
            for factor, precisions in zip((self._rows, self._columns), separated, strict=True)
        )
        return torch.outer(rows, columns), row_vectors.square(), column_vectors.square()


def _scaled(factor: Tensor, precisions: Tensor) -> Tensor:
    """``D^−½ F D^−½``."""
    roots = precisions.rsqrt().expand(len(factor))
    return factor * torch.outer(roots, roots)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0), vectors  # rounding may leave tiny negative ones


def _eigenvalues(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix).clamp_min(0)
