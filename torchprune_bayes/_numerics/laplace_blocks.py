"""Posterior precisions ``P = sH + D`` of a Laplace approximation, for several forms of ``H``.

Legend: a tensor is seen as a matrix ``[rows, columns]``, the first dimension by all others. ``H``
is the curvature summed over the data, ``s`` its scale, and ``D`` the diagonal of the prior
precisions ``δ``. ``γ = 1 − δ diag(P⁻¹)`` says per entry how far the data determine it, from 0 to 1;
its sum is the effective number of parameters. Results are float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """Prior precisions of a matrix, as a product of factors that broadcast.

    Args:
        factors: One or more float64 tensors, each ``[1 or rows, 1 or columns]``.
        shape: ``(rows, columns)``.

    Example:
        >>> rows, columns = torch.tensor([[2.0], [3.0]]), torch.tensor([[1.0, 5.0]])
        >>> precision = Precision((rows, columns), (2, 2))
        >>> precision.dense()
        tensor([[ 2., 10.],
                [ 3., 15.]])
    """

    factors: tuple[Tensor, ...]
    shape: tuple[int, int]

    def dense(self) -> Tensor:
        """The product, ``[rows, columns]``; where it is constant, a view of one number."""
        return prod(self.factors[1:], start=self.factors[0]).expand(self.shape)

    def log_sum(self) -> Tensor:
        """``Σ log δ``, the log-determinant of ``D``."""
        entries = prod(self.shape)
        parts = [factor.log().sum() * (entries // factor.numel()) for factor in self.factors]
        return torch.stack(parts).sum()

    def separated(self) -> tuple[Tensor, Tensor] | None:
        """Rows ``[1 or rows]`` and columns ``[1 or columns]`` whose product ``D`` is, if any."""
        if any(min(factor.shape) > 1 for factor in self.factors):
            return None
        one = self.factors[0].new_ones(1)
        over_rows = [f.flatten() for f in self.factors if f.shape[1] == 1]
        over_columns = [f.flatten() for f in self.factors if f.shape[1] > 1]
        return prod(over_rows, start=one), prod(over_columns, start=one)


class LaplaceBlock(ABC):
    """The curvature ``H`` of one tensor, or of several together, and quantities of ``sH + D``."""

    shape: tuple[int, int]

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Diagonal of ``H``, ``[rows, columns]``."""

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Eigenvalues of ``H``, in any order and shape; zeros may be left out."""

    @abstractmethod
    def log_det_ratio(self, precision: Precision, scale: float) -> Tensor:
        """``log det(sH + D) − log det D``, a scalar."""

    @abstractmethod
    def effective_parameters(self, precision: Precision, scale: float) -> Tensor:
        """``γ`` of each entry, ``[rows, columns]``."""

    @abstractmethod
    def variances(self, precision: Precision, scale: float) -> Tensor:
        """Diagonal of ``(sH + D)⁻¹``, ``[rows, columns]``."""

    def precisions(self, precision: Precision, scale: float) -> Tensor:
        """Diagonal of ``sH + D``, ``[rows, columns]``: exact, whatever the form of ``D``."""
        return scale * self.diagonal() + precision.dense()

    def smoothed_precisions(self, precision: Precision, scale: float) -> Tensor:
        """As :meth:`precisions`, with ``D`` as the form of ``H`` can hold it."""
        return self.precisions(precision, scale)

    def is_exact(self, precision: Precision) -> bool:
        """Whether :meth:`log_det_ratio` is exact, or an upper bound."""
        return True


class DiagonalBlock(LaplaceBlock):
    """``H = diag(h)``.

    Args:
        values: ``h``, ``[rows, columns]``, not negative, of any floating-point type.

    Cost: elementwise, with a few float64 copies of one tensor at a time.

    Example:
        >>> block = DiagonalBlock(torch.tensor([[3.0, 0.0]]))
        >>> one = Precision((torch.ones(1, 1, dtype=torch.float64),), (1, 2))
        >>> block.effective_parameters(one, scale=1.0)
        tensor([[0.7500, 0.0000]], dtype=torch.float64)
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self.shape = (values.shape[0], values.shape[1])

    def diagonal(self) -> Tensor:
        """``h``."""
        return self._values.double()

    def spectrum(self) -> Tensor:
        """``h``."""
        return self.diagonal()

    def log_det_ratio(self, precision: Precision, scale: float) -> Tensor:
        """``Σ log(1 + s h/δ)``."""
        return torch.log1p(scale * self.diagonal() / precision.dense()).sum()

    def effective_parameters(self, precision: Precision, scale: float) -> Tensor:
        """``s h/(s h + δ)``."""
        scaled = scale * self.diagonal()
        return scaled / (scaled + precision.dense())

    def variances(self, precision: Precision, scale: float) -> Tensor:
        """``1/(s h + δ)``."""
        return self.precisions(precision, scale).reciprocal()


class JointBlock(LaplaceBlock):
    """``H = U diag(l) Uᵀ`` over the joint entries of several tensors.

    ``sH + D = D^½ (I + W Wᵀ) D^½`` with ``W = D^−½ U (s l)^½``, so that one Cholesky factor of
    ``I + WᵀW`` gives determinant and inverse.

    Args:
        vectors: ``U``, ``[entries, rank]``.
        values: ``l``, ``[rank]``, not negative.

    Cost: ``entries · rank² + rank³`` multiplications and ``8 entries · rank`` bytes.

    Example:
        >>> block = JointBlock(torch.ones(2, 1), torch.tensor([3.0]))
        >>> one = Precision((torch.ones(1, 1, dtype=torch.float64),), (2, 1))
        >>> block.log_det_ratio(one, scale=1.0).exp()  # det [[4, 3], [3, 4]]
        tensor(7.0000, dtype=torch.float64)
    """

    def __init__(self, vectors: Tensor, values: Tensor) -> None:
        self._vectors, self._values = vectors.double(), values.double()
        self.shape = (len(vectors), 1)

    def diagonal(self) -> Tensor:
        """``Σ_r l_r U_ir²``."""
        return (self._vectors.square() @ self._values).unsqueeze(1)

    def spectrum(self) -> Tensor:
        """``l``, if the columns of ``U`` are orthonormal; otherwise from their Gram matrix."""
        roots = self._vectors * self._values.sqrt()
        return torch.linalg.eigvalsh(roots.mT @ roots).clamp_min(0)

    def log_det_ratio(self, precision: Precision, scale: float) -> Tensor:
        """``log det(I + WᵀW)``."""
        _, factor = self._whitened(precision, scale)
        return 2 * factor.diagonal().log().sum()

    def effective_parameters(self, precision: Precision, scale: float) -> Tensor:
        """Diagonal of ``W(I + WᵀW)⁻¹Wᵀ``."""
        whitened, factor = self._whitened(precision, scale)
        solved = torch.linalg.solve_triangular(factor, whitened.mT, upper=False)
        return solved.square().sum(0).unsqueeze(1)

    def variances(self, precision: Precision, scale: float) -> Tensor:
        """``(1 − γ)/δ``."""
        return (1.0 - self.effective_parameters(precision, scale)).clamp_min(0) / precision.dense()

    def _whitened(self, precision: Precision, scale: float) -> tuple[Tensor, Tensor]:
        whitened = self._vectors * (scale * self._values).sqrt() / precision.dense().sqrt()
        inner = whitened.mT @ whitened
        inner.diagonal().add_(1.0)
        return whitened, torch.linalg.cholesky(inner)
