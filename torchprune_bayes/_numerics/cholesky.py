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
