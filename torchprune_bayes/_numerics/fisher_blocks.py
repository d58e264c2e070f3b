"""Inverse of damped empirical Fisher blocks, computed without a rank-one recursion.

Legend, all batched over ``blocks``: ``G`` gradients ``[blocks, N, B]``, ``λ`` damping,
``F = λI + GᵀG/N`` the block, ``P`` pruned and ``K`` kept entries, ``w`` weights ``[blocks, B]``.

Two exact forms of ``F⁻¹``. By the Woodbury identity, with ``S = GGᵀ + NλI = LLᵀ`` and ``X = L⁻¹G``,
``F⁻¹ = (I − XᵀX)/λ`` (the sample-space form, for ``N < B``). Otherwise ``F`` itself is factorised
(the primal form). Gram matrices are accumulated and factorised in float64, because ``F`` has
condition numbers up to 10⁶ at the dampings that the papers use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import (
    damped_factor,
    damped_factor_inverse,
    inverse_of_lower,
)
from torchprune_bayes._numerics.gradient_tiles import (
    Gradients,
    damped_gram,
    gram,
    mean_squares,
    tiles,
    times,
    transposed_times,
    whitened_squares,
)
from torchprune_bayes._numerics.precision import float64_device, wide


class InverseFisher(ABC):
    """Damped inverse of a batch of Fisher blocks; see the module's legend.

    Laws, for every vector ``v`` and entry ``i``: ``F @ solve(v) == v``;
    ``inverse_diagonal()[i] == solve(e_i)[i] == columns([i])[i]``; all are float64 and finite;
    ``1/(λ + Σ_n g_ni²/N) <= inverse_diagonal()[i] <= 1/λ``.
    """

    def __init__(self, gradients: Gradients, damping: float) -> None:
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
            return self.solve_columns(wide(vectors))
        return self.solve_columns(wide(vectors).unsqueeze(-1)).squeeze(-1)

    def columns(self, indices: Tensor) -> Tensor:
        """Columns ``F⁻¹[:, i]`` for indices ``[blocks, k]``, as ``[blocks, B, k]``."""
        shape = (*self.shape, indices.shape[-1])
        place = float64_device(self.gradients.device)
        units = torch.zeros(shape, dtype=torch.float64, device=place)
        return self.solve_columns(units.scatter_(1, indices.to(place).unsqueeze(1), 1.0))


class WoodburyInverse(InverseFisher):
    """A form of ``F⁻¹ = (I − XᵀX)/λ``, for ``N < B``.

    Attributes:
        space: ``GGᵀ`` and its factorisations.
    """

    def __init__(self, gradients: Gradients, damping: float, space: SampleSpace) -> None:
        super().__init__(gradients, damping)
        self.space = space

    @abstractmethod
    def whitened(self, gradients: Tensor) -> Tensor:
        """``X`` for some columns of the gradients, in their dtype."""

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``: ``(1 − Σ_n X_ni²)/λ``."""
        diagonal = _empty(self.shape, self.space.inner)
        for where, tile in tiles(self.gradients):
            part = wide(self.whitened(tile).square_().sum(-2)).neg_().add_(1.0).div_(self.damping)
            diagonal[..., where] = _bounded(part, mean_squares(tile), self.damping)
        return diagonal


class SampleSpaceInverse(WoodburyInverse):
    """Woodbury form. Cost per block: N²B + N³/3 to build, N B per solve, N²B for the diagonal."""

    def __init__(
        self, gradients: Gradients, damping: float, space: SampleSpace | None = None
    ) -> None:
        super().__init__(gradients, damping, space or SampleSpace.of(gradients))
        self.factor = damped_factor(self.space.inner, self.count * damping)

    def whitened(self, gradients: Tensor) -> Tensor:
        """``L⁻¹ G`` for some columns of the gradients, in their dtype."""
        return self._inverse_factor.to(gradients) @ gradients

    @cached_property
    def _inverse_factor(self) -> Tensor:
        # A product of many small matrices is ten times as fast as solving with them.
        return inverse_of_lower(self.factor)

    def solve_columns(self, columns: Tensor) -> Tensor:
        """``(V − Gᵀ S⁻¹ G V)/λ``."""
        inner = torch.cholesky_solve(times(self.gradients, columns), self.factor)
        return (columns - transposed_times(self.gradients, inner)) / self.damping


class SpectralInverse(WoodburyInverse):
    """The sample-space form by the eigenvalues of ``GGᵀ = UΛUᵀ``, shared by every damping.

    Cost per block: ``N B`` for a solve and for the diagonal, once the space has ``(UᵀG)²``.
    """

    def __init__(
        self, gradients: Gradients, damping: float, space: SampleSpace | None = None
    ) -> None:
        super().__init__(gradients, damping, space or SampleSpace.of(gradients))
        values, self._vectors = self.space.spectrum
        self._shares = 1.0 / (values + self.count * damping)  # [blocks, N]

    def whitened(self, gradients: Tensor) -> Tensor:
        """``(Λ + Nλ)^(−½)Uᵀ G`` for some columns of the gradients, in their dtype."""
        rotation = self._shares.sqrt().unsqueeze(-1) * self._vectors.mT
        return rotation.to(gradients) @ gradients

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``: ``(1 − Σ_n (UᵀG)_ni²/(Λ_n + Nλ))/λ``."""
        return inverse_diagonals(self.gradients, self.space, [self.damping])[0]

    def solve_columns(self, columns: Tensor) -> Tensor:
        """``(V − GᵀU(Λ + Nλ)⁻¹UᵀG V)/λ``."""
        rotated = self._vectors.mT @ times(self.gradients, columns)
        inner = self._vectors @ (self._shares.unsqueeze(-1) * rotated)
        return (columns - transposed_times(self.gradients, inner)) / self.damping


class SampleSpace:
    """``GGᵀ`` of a batch of blocks, with everything that inverses at several dampings share.

    Args:
        inner: ``GGᵀ``, float64 ``[blocks, N, N]``.
        keep_squares: Whether ``(UᵀG)²``, as large as the gradients, is cached from one diagonal to
            the next.
    """

    def __init__(self, inner: Tensor, *, keep_squares: bool = False) -> None:
        self.inner = inner
        self._squares: list[Tensor] | None = [] if keep_squares else None

    @classmethod
    def of(cls, gradients: Gradients, *, keep_squares: bool = False) -> SampleSpace:
        """The space of gradients ``[blocks, N, B]``; ``N²B`` operations per block."""
        return cls(gram(gradients), keep_squares=keep_squares)

    def rotated_squares(self, gradients: Gradients) -> Iterator[Tensor]:
        """``(UᵀG)²``, a tile of columns at a time; ``N²B`` where it is not kept."""
        if self._squares:
            yield from self._squares
            return
        rotation = self.spectrum[1].mT.to(gradients.device, gradients.dtype)
        for _, tile in tiles(gradients):
            squares = (rotation @ tile).square_()
            if self._squares is not None:
                self._squares.append(squares)
            yield squares

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[blocks, N]``, not negative, and eigenvectors of ``GGᵀ``; ``9N³``."""
        values, vectors = torch.linalg.eigh(self.inner)
        return values.clamp_min(0.0), vectors

    def inverse(self, gradients: Gradients, damping: float) -> WoodburyInverse:
        """Invert the blocks, by the spectrum where that is cheap and may serve many dampings."""
        cheap = gradients.shape[0] == 1 and 8 * gradients.shape[-2] <= gradients.shape[-1]
        return (SpectralInverse if cheap else SampleSpaceInverse)(gradients, damping, self)


class PrimalInverse(InverseFisher):
    """Direct form. Cost per block: N B² + B³/3 to build, B² per solve, B³/3 for the diagonal."""

    def __init__(self, gradients: Tensor, damping: float) -> None:
        super().__init__(gradients, damping)
        self.factor = damped_factor(gram(gradients.mT) / self.count, damping)

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``: column sums of squares of ``L⁻¹``."""
        inverse = inverse_of_lower(self.factor)
        return _bounded(inverse.square().sum(-2), mean_squares(self.gradients), self.damping)

    def solve_columns(self, columns: Tensor) -> Tensor:
        """Two triangular solves."""
        return torch.cholesky_solve(columns, self.factor)


def inverse_diagonals(
    gradients: Gradients, space: SampleSpace, dampings: Sequence[float]
) -> Tensor:
    """Diagonals of ``F⁻¹`` for several dampings, in one pass over the gradients.

    ``(1 − Σ_n (UᵀG)_ni²/(Λ_n + Nλ))/λ`` with ``GGᵀ = UΛUᵀ``.

    Args:
        gradients: ``[blocks, N, B]``.
        space: Their ``GGᵀ``.
        dampings: ``k`` dampings.

    Returns:
        Float64 ``[k, blocks, B]``.

    Cost: ``9N³ + N²B + kNB`` per block.
    """
    (values, _), count = space.spectrum, gradients.shape[-2]
    steps = torch.tensor(dampings, dtype=torch.float64, device=values.device)
    shares = 1.0 / (values.unsqueeze(-2) + count * steps.unsqueeze(-1))
    # Rotations preserve sums of squares: one extra row gives Σ_n G_ni²/N.
    shares = torch.cat([shares, torch.full_like(shares[..., :1, :], 1.0 / count)], dim=-2)
    scale = steps.view(-1, *[1] * (len(gradients.shape) - 1))
    diagonals, start = _empty((len(dampings), *gradients.shape[::2]), values), 0
    for squares in space.rotated_squares(gradients):
        sums = wide(shares.to(squares) @ squares).movedim(-2, 0)  # [k + 1, blocks, size]
        stop = start + sums.shape[-1]
        part = sums[:-1].neg().add_(1.0).div_(scale)
        diagonals[..., start:stop] = _bounded(part, sums[-1], scale)
        start = stop
    return diagonals


def small_blocks_diagonal(gradients: Tensor, damping: float) -> Tensor:
    """Diagonal of ``F⁻¹`` of many small blocks at one damping: ``(1 − Σ_n (L⁻¹G)_ni²)/λ``.

    Args:
        gradients: ``[blocks, N, B]``, ``N`` smaller than ``B``.
        damping: ``λ > 0``.

    Returns:
        Float64 ``[blocks, B]``, within one per cent, see
        :func:`~torchprune_bayes._numerics.gradient_tiles.damped_gram`.

    Cost: ``3N²B/2 + 2N³/3`` per block.

    Example:
        >>> g = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]])
        >>> small_blocks_diagonal(g, damping=1.0)
        tensor([[0.5000, 1.0000],
                [0.2000, 1.0000]], dtype=torch.float64)
    """
    ridge = gradients.shape[-2] * damping
    inner = damped_gram(gradients, ridge)
    whitened = whitened_squares(damped_factor_inverse(inner, ridge).to(gradients), gradients)
    left = wide(whitened).neg_().add_(1.0)
    return bounded_shares(left, inner, ridge).div_(damping)


def bounded_shares(shares: Tensor, inner: Tensor, ridge: float) -> Tensor:
    """``λ (F⁻¹)_ii`` within its bounds: at most 1, and at least ``Nλ`` over ``Nλ`` and the trace.

    Guards against cancellation: ``F⁻¹_ii`` is at least ``1/F_ii``, and no ``F_ii`` is more than the
    trace.

    Args:
        shares: ``[blocks, B]`` float64; written to.
        inner: Gram matrix of the gradients in either form, ``[blocks, n, n]``.
        ridge: ``Nλ``.
    """
    trace = wide(inner.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True))
    return torch.maximum(shares, ridge / (ridge + trace), out=shares).clamp_(max=1.0)


def invert(gradients: Gradients, damping: float, space: SampleSpace | None = None) -> InverseFisher:
    """Invert Fisher blocks in the cheaper of the two exact forms.

    Args:
        gradients: ``[blocks, N, B]``.
        damping: ``λ > 0``.
        space: Their ``GGᵀ``, if already computed.

    Example:
        >>> g = torch.tensor([[[1.0, 0.0]]])
        >>> invert(g, damping=1.0).inverse_diagonal()
        tensor([[0.5000, 1.0000]], dtype=torch.float64)
    """
    if in_sample_space(gradients) or not isinstance(gradients, Tensor):
        return SampleSpaceInverse(gradients, damping, space)
    return PrimalInverse(gradients, damping)


def in_sample_space(gradients: Gradients) -> bool:
    """Whether ``N`` is so much smaller than ``B`` that the sample-space form is cheaper."""
    count, size = gradients.shape[-2:]
    return count <= 0.9 * size


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    # Vectors are filled a tile at a time: allocating memory costs more than arithmetic in the
    # cache.
    return torch.empty(tuple(shape), dtype=torch.float64, device=like.device)


def _bounded(diagonal: Tensor, mean_squares: Tensor, damping: float | Tensor) -> Tensor:
    # F⁻¹_ii >= 1/F_ii, with equality for a diagonal F: guards against cancellation.
    return diagonal.maximum(1.0 / (damping + mean_squares)).minimum(
        torch.as_tensor(1.0 / damping, dtype=torch.float64, device=diagonal.device)
    )
