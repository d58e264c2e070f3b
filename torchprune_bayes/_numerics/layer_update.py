"""New weights of a linear layer that is pruned, so that its outputs stay what they were.

Legend: ``W [rows, n]`` the weights of a layer, ``G = E[x xᵀ] [n, n]`` the second moment of its
inputs, damped and so positive definite. A mask keeps the inputs ``K`` of a row and prunes the
inputs ``P``. The mean squared change of a row's output is ``(w − ŵ)ᵀ G (w − ŵ)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import safe_cholesky
from torchprune_bayes._numerics.precision import wide

_BYTES = {"cpu": 2**24, "cuda": 2**28}  # of the matrices that are factorised at one time

Choice = Callable[[slice, Tensor, Tensor], Tensor]
"""``choose(columns, values, costs) -> keep``: which entries of some columns stay."""


def damped(moment: Tensor, damping: float) -> Tensor:
    """``G`` plus ``damping`` times the mean of its diagonal, float64; the identity if that is zero.

    Inputs that are all zero tell no weights apart: with the identity, the cost of a weight is its
    square, and what is kept does not move.

    Example:
        >>> damped(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 0.5).tolist()
        [[2.5, 0.0], [0.0, 0.5]]
    """
    matrix = wide(moment)
    matrix = matrix.clone() if matrix is moment else matrix
    mean = matrix.diagonal().mean()
    matrix.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
    return matrix


def solve_rows(gram: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """The weights on a mask that change the outputs the least, every row exactly.

    A row's solution is ``ŵ_K = w_K + G_KK⁻¹ G_KP w_P``, with ``ŵ_P = 0``.

    Args:
        gram: ``G``, float64 ``[n, n]``.
        weights: ``W``, ``[rows, n]``.
        keep: Boolean, like ``weights``; what is pruned may have weights, which are made up for.

    Returns:
        ``Ŵ``, float64.

    Raises:
        NumericalError: If ``G`` is not positive definite.

    Cost: ``Σ_rows |K|³/3`` multiplications, with rows batched by their number of kept weights.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> solve_rows(gram, torch.tensor([[1.0, 1.0]]), torch.tensor([[True, False]]))
        tensor([[1.5000, 0.0000]], dtype=torch.float64)
    """
    target = wide(weights) @ gram
    solution = torch.zeros_like(target)
    for rows, width in _alike(keep):
        index = (~keep[rows]).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        within = keep[rows].gather(1, index)
        square = gram[index.unsqueeze(2), index.unsqueeze(1)]
        square *= within.unsqueeze(2) & within.unsqueeze(1)
        square.diagonal(dim1=1, dim2=2).add_(~within)  # fills up the shorter rows
        right = (target[rows].gather(1, index) * within).unsqueeze(2)
        solved = torch.cholesky_solve(right, safe_cholesky(square)).squeeze(2)
        solution[rows] = solution[rows].scatter(1, index, solved * within)
    return solution


def descend_rows(
    gram: Tensor, weights: Tensor, keep: Tensor, steps: int, *, start: Tensor | None = None
) -> Tensor:
    """Approximate :func:`solve_rows` by conjugate gradients on all rows at once.

    From the masked weights on, each step changes the outputs less than the one before, and after
    ``max |K|`` steps the solution is exact. A few are enough: what is left then lies in directions
    that hardly change the outputs. Gradients are divided by ``diag G``. Computed in float32, or in
    float64 where the weights are.

    Args:
        gram: ``G``, ``[n, n]``.
        weights: ``W``, ``[rows, n]``.
        keep: Boolean, like ``weights``.
        steps: Steps of conjugate gradients.
        start: Where they begin, zero where pruned; default ``W`` on the mask.

    Returns:
        ``Ŵ``, in the dtype that was computed in.

    Cost: ``steps · rows · n²`` multiplications.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> descend_rows(gram, torch.tensor([[1.0, 1.0]]), torch.tensor([[True, False]]), 1)
        tensor([[1.5000, 0.0000]])
    """
    original = weights.to(torch.promote_types(weights.dtype, torch.float32))
    matrix = gram.new_empty(gram.shape, dtype=original.dtype)
    torch.div(gram, gram.diagonal().mean(), out=matrix)  # the scale does not matter
    kept = keep.to(original)
    scale, tiny = matrix.diagonal().reciprocal(), torch.finfo(original.dtype).tiny
    solution = original * kept if start is None else start.to(original)
    residual = (original - solution) @ matrix * kept
    scaled = residual * scale
    direction, size = scaled, (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        slope = direction @ matrix * kept
        step = size / (direction * slope).sum(1, keepdim=True).clamp_min(tiny)
        solution = torch.addcmul(solution, step, direction)
        residual = torch.addcmul(residual, step, slope, value=-1)
        scaled = residual * scale
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        direction = torch.addcmul(scaled, size / before.clamp_min(tiny), direction)
    return solution


def sweep(
    gram: Tensor, weights: Tensor, choose: Choice, *, group: int = 128, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Prune column by column, compensating in the columns that follow.

    `SparseGPT (Frantar and Alistarh, 2023) <https://arxiv.org/abs/2301.00774>`_, algorithm 1: with
    the upper Cholesky factor ``U`` of ``G⁻¹``, to prune ``w_j`` changes what comes after it by
    ``−(w_j/U_jj) U_j,j+1:``; the columns before it are settled. Rows share ``U``, so that this is
    much cheaper than :func:`solve_rows`, and less exact.

    Args:
        gram: ``G``, float64 ``[n, n]``.
        weights: ``W``, ``[rows, n]``.
        choose: Called for every ``group`` of columns with these columns, their values at the time,
            and the costs ``w_j²/U_jj²`` of pruning them; returns what is kept.
        group: Columns whose mask is chosen at once; divides ``block``.
        block: Columns after which changes are handed to all others at once.

    Returns:
        New weights, float64 and zero where pruned, and the mask.

    Raises:
        NumericalError: If ``G`` is not positive definite.

    Cost: ``n³ + rows n²/2`` multiplications.

    Example:
        >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> sweep(gram, torch.ones(1, 2), lambda columns, values, costs: costs > 1.6)
        (tensor([[0.0000, 1.5000]], dtype=torch.float64), tensor([[False,  True]]))
    """
    inverse = torch.cholesky_inverse(safe_cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True)
    values = wide(weights).clone()
    keep = torch.ones_like(values, dtype=torch.bool)
    columns = values.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = values.new_zeros(len(values), stop - start)
        for j in range(start, stop):
            if (j - start) % group == 0:
                chosen = slice(j, min(j + group, stop))
                costs = (values[:, chosen] / upper.diagonal()[chosen]).square()
                keep[:, chosen] = choose(chosen, values[:, chosen], costs)
            error = torch.where(keep[:, j], 0.0, values[:, j] / upper[j, j])
            values[:, j:stop] -= torch.outer(error, upper[j, j:stop])
            errors[:, j - start] = error
        values[:, stop:] -= errors @ upper[start:stop, stop:]
    return torch.where(keep, values, 0.0), keep


def _alike(keep: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows with like many kept entries, few enough at a time, and the most that one keeps."""
    counts = keep.sum(1)
    order = counts.argsort(stable=True)
    sizes = counts[order].tolist()
    budget = _BYTES.get(keep.device.type, _BYTES["cuda"])
    stop = len(sizes)
    while stop and sizes[stop - 1]:
        width = sizes[stop - 1]
        start = max(0, stop - max(1, budget // (8 * width**2)))
        yield order[start:stop], width
        stop = start
