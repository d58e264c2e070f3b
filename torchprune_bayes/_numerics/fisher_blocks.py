"""Inverse of damped empirical Fisher blocks, without ever running a rank-one recursion.

Legend, all batched over ``blocks``: ``G`` gradients ``[blocks, N, B]``, ``λ`` damping,
``F = λI + GᵀG/N`` the block, ``P`` pruned and ``K`` kept entries, ``w`` weights ``[blocks, B]``.

Two exact forms of ``F⁻¹``. By the Woodbury identity, with ``S = GGᵀ + NλI = LLᵀ`` and ``X = L⁻¹G``,
``F⁻¹ = (I − XᵀX)/λ`` (the sample-space form, for ``N < B``). Otherwise ``F`` itself is factorised
(the primal form). Gram matrices are accumulated and factorised in float64, because ``F`` has
condition numbers up to 10⁶ at the dampings that the papers use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import safe_cholesky

_TILE = 8192


def gram(left: Tensor) -> Tensor:
    """Return ``left @ leftᵀ`` in float64, converted tile by tile.

    Args:
        left: ``[..., n, m]`` of any float dtype.

    Returns:
        ``[..., n, n]`` float64.
    """
    total = left.new_zeros((*left.shape[:-1], left.shape[-2]), dtype=torch.float64)
    for tile in left.split(_TILE, dim=-1):
        wide = tile.double()
        total += wide @ wide.mT
    return total


def times(matrix: Tensor, columns: Tensor) -> Tensor:
    """Return ``matrix @ columns`` in float64, converted tile by tile along its longer side.

    Args:
        matrix: ``[..., n, m]`` of any float dtype.
        columns: ``[..., m, k]`` float64.

    Returns:
        ``[..., n, k]`` float64.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return torch.cat([tile.double() @ columns for tile in matrix.split(_TILE, dim=-2)], dim=-2)
    tiles = zip(matrix.split(_TILE, dim=-1), columns.split(_TILE, dim=-2), strict=True)
    return torch.stack([tile.double() @ part for tile, part in tiles]).sum(0)


class InverseFisher(ABC):
    """Damped inverse of a batch of Fisher blocks; see the module's legend.

    Laws, for every vector ``v`` and entry ``i``: ``F @ solve(v) == v``;
    ``inverse_diagonal()[i] == solve(e_i)[i] == columns([i])[i]``; all are float64 and finite;
    ``1/(λ + Σ_n g_ni²/N) <= inverse_diagonal()[i] <= 1/λ``.
    """

    def __init__(self, gradients: Tensor, damping: float) -> None:
        self.gradients = gradients
        self.damping = damping
        self.count = gradients.shape[-2]

    @property
    def shape(self) -> torch.Size:
        """``[blocks, B]``."""
        return self.gradients.shape[::2]

    @abstractmethod
    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``, ``[blocks, B]``."""

    @abstractmethod
    def solve_columns(self, columns: Tensor) -> Tensor:
        """``F⁻¹ V`` for float64 columns ``[blocks, B, k]``."""

    def solve(self, vectors: Tensor) -> Tensor:
        """``F⁻¹ v`` for vectors ``[blocks, B]`` or columns ``[blocks, B, k]``."""
        if vectors.ndim == 3:
            return self.solve_columns(vectors.double())
        return self.solve_columns(vectors.double().unsqueeze(-1)).squeeze(-1)

    def columns(self, indices: Tensor) -> Tensor:
        """Columns ``F⁻¹[:, i]`` for indices ``[blocks, k]``, as ``[blocks, B, k]``."""
        return self.solve_columns(_unit_columns(self.gradients, indices))

    def _clamped(self, diagonal: Tensor) -> Tensor:
        # F⁻¹_ii >= 1/F_ii, with equality for a diagonal F: guards against cancellation.
        squares = torch.linalg.vector_norm(self.gradients, dim=-2).double().square() / self.count
        return diagonal.maximum(1.0 / (self.damping + squares)).clamp_max(1.0 / self.damping)


class WoodburyInverse(InverseFisher):
    """A form of ``F⁻¹ = (I − XᵀX)/λ``, for ``N < B``."""

    @abstractmethod
    def whitened(self, gradients: Tensor) -> Tensor:
        """``X`` for some columns of the gradients, in their dtype."""


class SampleSpaceInverse(WoodburyInverse):
    """Woodbury form. Cost per block: N²B + N³/3 to build, N B per solve, N²B for the diagonal."""

    def __init__(self, gradients: Tensor, damping: float, inner: Tensor | None = None) -> None:
        super().__init__(gradients, damping)
        damped = gram(gradients) if inner is None else inner.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(self.count * damping)
        self.factor = safe_cholesky(damped)

    def whitened(self, gradients: Tensor) -> Tensor:
        """``L⁻¹ G`` for some columns of the gradients, in their dtype."""
        factor = self.factor.to(gradients.dtype)
        return torch.linalg.solve_triangular(factor, gradients, upper=False)

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``: ``(1 − Σ_n X_ni²)/λ``."""
        sums = [
            self.whitened(tile).double().square().sum(-2)
            for tile in self.gradients.split(_TILE, dim=-1)
        ]
        return self._clamped((1.0 - torch.cat(sums, dim=-1)) / self.damping)

    def solve_columns(self, columns: Tensor) -> Tensor:
        """``(V − Gᵀ S⁻¹ G V)/λ``."""
        inner = torch.cholesky_solve(times(self.gradients, columns), self.factor)
        return (columns - times(self.gradients.mT, inner)) / self.damping


class SpectralInverse(WoodburyInverse):
    """The sample-space form by the eigenvalues of ``GGᵀ = UΛUᵀ``, which serve every damping.

    Cost per block: ``N B`` for the diagonal and for a solve, once ``U`` and ``UᵀG`` are known.
    """

    def __init__(self, gradients: Tensor, damping: float, spectrum: Spectrum) -> None:
        super().__init__(gradients, damping)
        self.spectrum = spectrum
        self.shares = 1.0 / (spectrum.eigenvalues + self.count * damping)  # [blocks, N]

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``: ``(1 − Σ_n (UᵀG)_ni²/(Λ_n + Nλ))/λ``."""
        sums = times(self.spectrum.squares.mT, self.shares.unsqueeze(-1)).squeeze(-1)
        return self._clamped((1.0 - sums) / self.damping)

    def whitened(self, gradients: Tensor) -> Tensor:
        """``(Λ + Nλ)^(−½)Uᵀ G`` for some columns of the gradients, in their dtype."""
        rotated = self.spectrum.vectors.mT.to(gradients.dtype) @ gradients
        return self.shares.sqrt().unsqueeze(-1).to(gradients.dtype) * rotated

    def solve_columns(self, columns: Tensor) -> Tensor:
        """``(V − GᵀU(Λ + Nλ)⁻¹UᵀG V)/λ``."""
        rotated = self.spectrum.vectors.mT @ times(self.gradients, columns)
        inner = self.spectrum.vectors @ (self.shares.unsqueeze(-1) * rotated)
        return (columns - times(self.gradients.mT, inner)) / self.damping


class Spectrum:
    """Eigenvalues and eigenvectors of ``GGᵀ`` and the squares of ``UᵀG``; ``4 N B`` bytes.

    Cost per block: ``9 N³`` and ``N² B``.
    """

    def __init__(self, gradients: Tensor, inner: Tensor) -> None:
        eigenvalues, self.vectors = torch.linalg.eigh(inner)
        self.eigenvalues = eigenvalues.clamp_min(0.0)
        self.squares = (self.vectors.mT.to(gradients.dtype) @ gradients).square_()


class SampleSpace:
    """``GGᵀ`` of a batch of blocks, and what else inverses of several dampings can share."""

    def __init__(self, gradients: Tensor) -> None:
        self.inner = gram(gradients)
        self._spectrum: Spectrum | None = None

    def inverse(self, gradients: Tensor, damping: float) -> InverseFisher:
        """Invert the blocks, by the spectrum unless it would cost more than the gradients do."""
        if 8 * gradients.shape[-2] > gradients.shape[-1]:
            return SampleSpaceInverse(gradients, damping, self.inner)
        if self._spectrum is None:
            self._spectrum = Spectrum(gradients, self.inner)
        return SpectralInverse(gradients, damping, self._spectrum)


class PrimalInverse(InverseFisher):
    """Direct form. Cost per block: N B² + B³/3 to build, B² per solve, B³/3 for the diagonal."""

    def __init__(self, gradients: Tensor, damping: float) -> None:
        super().__init__(gradients, damping)
        fisher = gram(gradients.mT) / self.count
        fisher.diagonal(dim1=-2, dim2=-1).add_(damping)
        self.factor = safe_cholesky(fisher)

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``: column sums of squares of ``L⁻¹``."""
        eye = torch.eye(self.factor.shape[-1], dtype=torch.float64, device=self.factor.device)
        inverse = torch.linalg.solve_triangular(
            self.factor, eye.expand_as(self.factor), upper=False
        )
        return self._clamped(inverse.square().sum(-2))

    def solve_columns(self, columns: Tensor) -> Tensor:
        """Two triangular solves."""
        return torch.cholesky_solve(columns, self.factor)


def invert(gradients: Tensor, damping: float, inner: Tensor | None = None) -> InverseFisher:
    """Invert Fisher blocks in the cheaper of the two exact forms.

    Args:
        gradients: ``[blocks, N, B]``.
        damping: ``λ > 0``.
        inner: ``GGᵀ`` in float64, if it is known.

    Example:
        >>> g = torch.tensor([[[1.0, 0.0]]])
        >>> invert(g, damping=1.0).inverse_diagonal()
        tensor([[0.5000, 1.0000]], dtype=torch.float64)
    """
    if in_sample_space(gradients):
        return SampleSpaceInverse(gradients, damping, inner)
    return PrimalInverse(gradients, damping)


def in_sample_space(gradients: Tensor) -> bool:
    """Whether ``N`` is so much smaller than ``B`` that the sample-space form is cheaper."""
    count, size = gradients.shape[-2:]
    return count <= 0.9 * size


def _unit_columns(gradients: Tensor, indices: Tensor) -> Tensor:
    blocks, _, size = gradients.shape
    units = gradients.new_zeros((blocks, size, indices.shape[-1]), dtype=torch.float64)
    return units.scatter_(1, indices.unsqueeze(1), 1.0)
