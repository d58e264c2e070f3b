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
    if _is_usable(failed.any()):
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
    return safe_cholesky(_damped(matrix, damping))


def damped_factor_inverse(matrix: Tensor, damping: float) -> Tensor:
    """``L⁻¹`` of the Cholesky factor ``L`` of ``matrix + damping I``.

    By halves, where many are factorised together: of their work little is then left to the factors
    of small matrices, and the rest are products. Takes half of the time of a factor and its
    inverse one after the other.

    Args:
        matrix: ``[n, n]`` or ``[blocks, n, n]``, of which the lower triangle is read; not written
            to.
        damping: Number to add to the diagonal.

    Raises:
        NumericalError: As :func:`safe_cholesky`.

    Cost: ``2n³/3`` multiplications per matrix.

    Example:
        >>> damped_factor_inverse(torch.tensor([[3.0]]), 1.0)
        tensor([[0.5000]])
    """
    if matrix.ndim != 3 or not _has_halves(matrix.shape[-1]):
        return inverse_of_lower(damped_factor(matrix, damping))
    damped = _damped(matrix, damping)
    flags: list[Tensor] = []
    inverse = _factor_inverse(damped, flags)
    if _is_usable(torch.stack(flags).any()):
        return inverse
    return inverse_of_lower(safe_cholesky(damped))


def _damped(matrix: Tensor, damping: float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    return damped


def _is_usable(failed: Tensor) -> bool:
    """Whether a factorisation succeeded; inside of :func:`checked_once` that is asked later."""
    later = _LATER.get()
    if later is None:
        return not failed
    later.flags.append(failed)
    return True


def _factor_inverse(matrix: Tensor, flags: list[Tensor]) -> Tensor:
    # [[A, ·], [B, C]] = L Lᵀ has the factor [[L₁, 0], [B L₁⁻ᵀ, L₂]] with L₁L₁ᵀ = A and
    # L₂L₂ᵀ = C − (B L₁⁻ᵀ)(B L₁⁻ᵀ)ᵀ.
    size = matrix.shape[-1]
    if not _has_halves(size):
        factor, failed = torch.linalg.cholesky_ex(matrix)
        flags.append(failed.any())
        return inverse_of_lower(factor)
    half = size // 2
    above = _factor_inverse(matrix[:, :half, :half], flags)
    beside = matrix[:, half:, :half] @ above.mT
    rest = torch.baddbmm(matrix[:, half:, half:], beside, beside.mT, alpha=-1)
    below = _factor_inverse(rest, flags)
    return _joined_inverse(above, below, beside)


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
    if factor.ndim != 3 or not _has_halves(size):
        eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    half = size // 2
    halves = torch.cat([factor[:, :half, :half], factor[:, half:, half:]])
    above, below = inverse_of_lower(halves).chunk(2)
    return _joined_inverse(above, below, factor[:, half:, :half])


def _has_halves(size: int) -> bool:
    return size > _SMALL and size % 2 == 0


def _joined_inverse(above: Tensor, below: Tensor, beside: Tensor) -> Tensor:
    """Inverse of ``[[L₁, 0], [B, L₂]]`` from ``L₁⁻¹``, ``L₂⁻¹`` and ``B``."""
    blocks, half = above.shape[:2]
    inverse = above.new_zeros(blocks, 2 * half, 2 * half)
    inverse[:, :half, :half], inverse[:, half:, half:] = above, below
    inverse[:, half:, :half] = (below @ (beside @ above)).neg_()
    return inverse
