"""Cost of removing many weights at once when the remaining ones compensate.

Legend: ``G`` gradients ``[N, B]``, ``λ`` damping, ``F = λI + GᵀG/N`` the Fisher block, ``P`` the
entries of one unit, ``w`` weights ``[B]``, ``S = GGᵀ + NλI``.

The least rise of ``½ δᵀFδ`` with ``δ_P = −w_P`` is ``½ w_Pᵀ((F⁻¹)_PP)⁻¹w_P``, the joint form of the
optimal brain surgeon (WoodFisher, arXiv 2004.14340, appendix). By the Woodbury identity this is

    λ/2 · w_Pᵀ(I − G_PᵀS⁻¹G_P)⁻¹w_P = λ/2 · (|w_P|² + s_Pᵀ(S − G_PG_Pᵀ)⁻¹s_P),   s_P = G_Pw_P,

with one matrix of size ``|P|``, or one of size ``N``, for each unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import safe_cholesky
from torchprune_bayes._numerics.gradient_tiles import gram
from torchprune_bayes._numerics.precision import wide


class JointCosts:
    """Costs of removing units, each alone, with the best answer of all other entries of a block.

    Args:
        gradients: ``[N, B]``.
        damping: ``λ > 0``.
        weights: ``[B]``.
        memory_bytes: Room for the matrices of the units that are dealt with at one time.

    Cost: ``N²B`` for the block, ``N²m + n³/3`` for each unit of ``m`` entries, ``n = min(N, m)``.

    Example:
        >>> block = JointCosts(torch.tensor([[1.0, 0.0]]), 1.0, torch.tensor([2.0, 3.0]))
        >>> both = torch.tensor([[0], [1]])
        >>> block.of(both, torch.ones_like(both, dtype=torch.bool))
        tensor([4.0000, 4.5000], dtype=torch.float64)
    """

    def __init__(
        self, gradients: Tensor, damping: float, weights: Tensor, memory_bytes: float = 2.0**28
    ) -> None:
        self.damping, self.weights, self.memory_bytes = damping, weights, memory_bytes
        self._rows = _root(gradients)
        self._inner = gram(self._rows)
        self._inner.diagonal().add_(len(gradients) * damping)

    def of(self, indices: Tensor, valid: Tensor) -> Tensor:
        """Cost of each unit.

        Args:
            indices: ``[units, m]``, the entries of each unit, each entry once, padded at will.
            valid: Boolean ``[units, m]``, ``False`` for padding.

        Returns:
            ``[units]`` float64.
        """
        longest, count = indices.shape[1], len(self._rows)
        per_unit = 8 * 3 * (count * longest + min(longest, count) ** 2)
        chunk = max(int(self.memory_bytes / max(per_unit, 1)), 1)
        costs = [self.weights.new_zeros(0, dtype=torch.float64)]
        for index, real in zip(indices.split(chunk), valid.split(chunk), strict=True):
            own = wide(self.weights[index]) * real  # [units, m]
            columns = wide(self._rows[:, index].transpose(0, 1)) * real.unsqueeze(1)
            if longest <= count:
                rise = _by_entries(columns, own, self._factor)
            else:
                rise = _by_samples(columns, own, self._inner)
            costs.append(0.5 * self.damping * rise)
        return torch.cat(costs)

    @cached_property
    def _factor(self) -> Tensor:
        return safe_cholesky(self._inner)


def sums_of_units(values: Tensor, owned: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Sum over all that each unit owns of a tensor, an entry in its row and its column once.

    Args:
        values: ``[k, *shape]``, ``k`` tensors of one shape.
        owned: Pairs of a dimension of ``shape`` and the positions ``[units, entries]`` along it;
            those along one dimension have nothing in common.

    Returns:
        ``[k, units]`` float64.

    Example:
        >>> one = torch.tensor([[0]])
        >>> sums_of_units(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), [(0, one), (1, one)])
        tensor([[6.]], dtype=torch.float64)
    """
    total = values.new_zeros(len(values), len(owned[0][1]), dtype=torch.float64)
    for dim, positions in owned:
        lines = values.movedim(dim + 1, 1).unsqueeze(-1).flatten(2).sum(2, dtype=torch.float64)
        total += lines[:, positions].sum(2)
    for (dim, rows), (other, columns) in combinations(owned, 2):
        if dim != other:  # where they cross, both have counted
            plane = values.movedim((dim + 1, other + 1), (1, 2)).unsqueeze(-1).flatten(3)
            crossing = plane.sum(3, dtype=torch.float64)
            total -= crossing[:, rows[:, :, None], columns[:, None, :]].sum((2, 3))
    return total


def _root(gradients: Tensor) -> Tensor:
    # Any matrix with the same GᵀG will do, and the triangular factor has no more rows than columns.
    count, size = gradients.shape
    return torch.linalg.qr(wide(gradients), mode="r").R if count > size else gradients


def _by_entries(columns: Tensor, own: Tensor, factor: Tensor) -> Tensor:
    whitened = torch.linalg.solve_triangular(
        factor.expand(len(columns), -1, -1), columns, upper=False
    )
    rest = -(whitened.mT @ whitened)
    rest.diagonal(dim1=-2, dim2=-1).add_(1.0)
    solved = torch.cholesky_solve(own.unsqueeze(-1), safe_cholesky(rest))
    return (own.unsqueeze(-1) * solved).sum((1, 2))


def _by_samples(columns: Tensor, own: Tensor, inner: Tensor) -> Tensor:
    change = columns @ own.unsqueeze(-1)  # s_P, [units, N, 1]
    solved = torch.cholesky_solve(change, safe_cholesky(inner - columns @ columns.mT))
    return own.square().sum(1) + (change * solved).sum((1, 2))
