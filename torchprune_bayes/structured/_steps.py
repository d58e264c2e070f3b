"""Steps in which a model is shrunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torchprune_bayes._checks import check_choice, check_count, check_fraction
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured._shrinking import Target


def sparsities(
    sparsity: float | None, target: str, steps: int | Sequence[float]
) -> list[float | None]:
    """Return the sparsity after each step; ``None`` where the evidence decides.

    Raises:
        ArgumentError: If they have impossible values, or do not go together.
        ArgumentTypeError: If they have the wrong type.

    Example:
        >>> sparsities(0.5, "params", 2), sparsities(0.5, "params", [0.3, 0.5])
        ([0.25, 0.5], [0.3, 0.5])
    """
    check_choice("target", target, get_args(Target))
    if target == "evidence":
        if sparsity is not None or not isinstance(steps, int):
            raise ArgumentError(
                "Expected no sparsity and a number of steps for target='evidence', got "
                f"sparsity={sparsity!r} and steps={steps!r}."
            )
        check_count("steps", steps)
        return [None] * steps
    check_fraction("sparsity", sparsity, closed=False)
    assert sparsity is not None
    if isinstance(steps, Sequence):
        path = list(steps)
        for fraction in path:
            check_fraction("steps", fraction, closed=False)
        if not path or path[-1] != sparsity or path != sorted(path):
            raise ArgumentError(
                f"Expected `steps` to rise to the sparsity {sparsity:g}, got {path!r}."
            )
        return [*path]
    check_count("steps", steps)
    return [*(sparsity * (step + 1) / steps for step in range(steps - 1)), sparsity]
