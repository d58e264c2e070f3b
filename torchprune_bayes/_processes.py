"""What several processes of ``torch.distributed`` say to one another; one alone talks to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from torchprune_bayes.errors import CalibrationError

Value = TypeVar("Value")


def several() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if several() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if several() else 1


def everywhere(value: Value) -> list[Value]:
    """Collect a picklable value from all processes, in the order of their ranks."""
    if not several():
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def together(compute: Callable[[], Value]) -> Value:
    """Run something in every process; if it fails in one, it fails in all, and none waits.

    Raises:
        CalibrationError: If another process failed.
    """
    value: Any = None
    error: Exception | None = None
    try:
        value = compute()
    except Exception as raised:  # the others would wait for this process for ever
        error = raised
    reasons = everywhere(None if error is None else str(error))
    if error is not None:
        raise error
    for source, reason in enumerate(reasons):
        if reason is not None:
            raise CalibrationError(
                f"Expected this to work in all processes, got an error in process {source}: "
                f"{reason}"
            )
    return value
