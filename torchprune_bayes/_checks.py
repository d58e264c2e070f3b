"""Argument and tensor checks: each raises one sentence with what was expected and found."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError


def check_amount(amount: Any) -> None:
    """Refuse an ``amount`` that is no fraction in [0, 1] and no count."""
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise ArgumentTypeError(
            "Expected `amount` to be a float (fraction of what is left) or an int (count), "
            f"got {amount!r} of type {type(amount).__name__}."
        )
    if isinstance(amount, numbers.Integral):
        if amount < 0:
            raise ArgumentError(f"Expected a non-negative count for `amount`, got {amount}.")
    elif not 0.0 <= float(amount) <= 1.0:
        raise ArgumentError(f"Expected a fraction in [0, 1] for `amount`, got {amount}.")


def count_to_prune(amount: float | int, remaining: int) -> int:
    """Turn ``amount`` into a number of entries, as PyTorch does: ``round(amount * remaining)``."""
    if not isinstance(amount, numbers.Integral):
        return round(float(amount) * remaining)
    if amount > remaining:
        raise ArgumentError(
            f"Expected `amount` of at most {remaining}, the number of entries left, got {amount}."
        )
    return int(amount)


def check_fraction(name: str, value: Any, *, closed: bool = True) -> None:
    """Refuse a value outside [0, 1], or outside [0, 1) where ``closed`` is false."""
    _check_real(name, value)
    if not 0.0 <= value <= 1.0 or (value == 1.0 and not closed):
        raise ArgumentError(f"Expected `{name}` in [0, 1{']' if closed else ')'}, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse a number that is not finite and greater than zero."""
    _check_real(name, value)
    if not 0.0 < value < float("inf"):
        raise ArgumentError(f"Expected `{name}` to be positive and finite, got {value!r}.")


def check_count(name: str, value: Any, *, minimum: int = 1) -> None:
    """Refuse anything but an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(
            f"Expected `{name}` to be an int, got {value!r} of type {type(value).__name__}."
        )
    if value < minimum:
        raise ArgumentError(f"Expected `{name}` of at least {minimum}, got {value}.")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuse a value that is not one of ``choices``."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ArgumentError(f"Expected `{name}` to be one of {allowed}, got {value!r}.")


def check_finite(name: str, value: Tensor) -> None:
    """Refuse a tensor with NaN or infinite entries."""
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ArgumentError(
            f"Expected `{name}` to be finite, got {bad} NaN or infinite of {value.numel()} entries."
        )


def _check_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(
            f"Expected `{name}` to be a number, got {value!r} of type {type(value).__name__}."
        )


def check_keys(what: str, state: Any, keys: Collection[str]) -> None:
    """Refuse what is no mapping with exactly these keys, as a loaded state may be.

    Args:
        what: Whose state it should be, for the message.
        state: What was loaded.
        keys: The keys of such a state.

    Raises:
        ArgumentError: If it has others, or is no mapping.

    Example:
        >>> check_keys("a state", {"b": 3}, {"a", "b"})
        Traceback (most recent call last):
            ...
        torchprune_bayes.errors.ArgumentError: Expected the keys a and b in a state, got ['b'].
    """
    if not isinstance(state, Mapping) or set(state) != set(keys):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        *most, last = sorted(keys)
        wanted = f"{', '.join(most)} and {last}" if most else last
        raise ArgumentError(f"Expected the keys {wanted} in {what}, got {got}.")
