"""Cholesky factors of matrices that are positive definite up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar
from warnings import warn

import torch
from torch import Tensor

from torchprune_bayes.errors import NumericalError, NumericalWarning

T = TypeVar("T")

_ATTEMPTS = 6
_SMALL = 16


class LaterChecks:
    """Whether any factorisation failed, read from the device once for all of them."""

    def __init__(self) -> None:
        self.flags: list[Tensor] = []

    def failed(self) -> bool:
        """Whether at least one failed."""
        return bool(self.flags) and bool(torch.stack(self.flags).any())


_LATER: ContextVar[LaterChecks | None] = ContextVar("later", default=None)


def checked_once(run: Callable[[], T]) -> T:
    """Run a calculation whose factorisations are checked at its end, and not one by one.

    If one failed, the result is discarded, and everything is run again with a check
    and, if needed, added jitter for each factorisation.

    Args:
        run: A function without side effects.

    Example:
        >>> checked_once(lambda: safe_cholesky(torch.tensor([[4.0]])))
        tensor([[2.]])
    """
    checks = LaterChecks()
    token = _LATER.set(checks)
    try:
        result = run()
    except Exception:
        if not checks.failed():
            raise
    else:
        if not checks.failed():
            return result
    finally:
        _LATER.reset(token)
    return run()


def safe_cholesky(matrix: Tensor) -> Tensor:
    """Factor a symmetric matrix, adding jitter to its diagonal if rounding makes it indefinite.

    Args:
        matrix: ``[..., n, n]`` float64, symmetric positive definite up to rounding.

    Returns:
        The lower factor ``L`` with ``L Lᵀ = matrix``, of the same shape.

    Raises:
        NumericalError: If the matrix is not finite, or indefinite beyond rounding.

    Warns:
        NumericalWarning: With the jitter that was added, relative to the mean diagonal.

    Cost: n³/3 multiplications per matrix, n² float64 of memory.

    Example:
        >>> safe_cholesky(torch.tensor([[4.0]], dtype=torch.float64))
        tensor([[2.]], dtype=torch.float64)
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    later = _LATER.get()
    if later is not None:
        later.flags.append(failed.any())
        return factor
    if not failed.any():
        return factor
    if not torch.isfinite(matrix).all():
        raise NumericalError("Expected a finite matrix to factorise, got NaN or infinite entries.")
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for attempt in range(_ATTEMPTS):
        jitter = 10.0 ** (attempt - 12)
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter * scale * eye)
        if not failed.any():
            warn(
                f"A Cholesky factorisation needed {jitter:.0e} of the mean diagonal added; "
                "a larger damping avoids this.",
                NumericalWarning,
                stacklevel=2,
            )
            return factor
    raise NumericalError(
        f"Expected a positive definite matrix, got one that stays indefinite with {jitter:.0e} of "
        "its mean diagonal added: use a larger damping."
    )


def damped_factor(matrix: Tensor, damping: float) -> Tensor:
    """Cholesky factor of ``matrix + damping I``, which is not written to."""
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    return safe_cholesky(damped)


def inverse_of_lower(factor: Tensor) -> Tensor:
    """Inverse of lower triangular matrices.

    By halves, where many are inverted together: products of many small matrices are fast, solving
    with them is not.

    Args:
        factor: ``[n, n]`` or ``[blocks, n, n]``.

    Example:
        >>> inverse_of_lower(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([[ 0.5000,  0.0000],
                [-0.5000,  1.0000]])
    """
    size = factor.shape[-1]
    if size <= _SMALL or size % 2 or factor.ndim != 3:
        eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    half = size // 2
    halves = torch.cat([factor[:, :half, :half], factor[:, half:, half:]])
    above, below = inverse_of_lower(halves).chunk(2)
    inverse = torch.zeros_like(factor)
    inverse[:, :half, :half], inverse[:, half:, half:] = above, below
    inverse[:, half:, :half] = (below @ (factor[:, half:, :half] @ above)).neg_()
    return inverse
