"""Exchanges between the ranks of ``torch.distributed``; a single process exchanges with itself.

In plain words: a rank that fails must tell the others, which would wait for it until a time-out. So
every exchange carries the reason of whichever rank failed before it, and raises it on all ranks. An
error that all ranks know of is not sent again, however many exchanges it passes on its way out.

By hand, since the utilities of torch.distributed and accelerate raise an error where it happened
and leave the other ranks waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from torchprune_bayes.errors import CalibrationError

Value = TypeVar("Value")

_SHARED = "_error_shared_with_all_ranks"


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def all_gathered(value: Value) -> list[Value]:
    """Collect a picklable value from all processes, in the order of their ranks.

    Raises:
        CalibrationError: If another process failed before it came here.
    """
    return _exchange(value, None) if is_distributed() else [value]


def on_all_ranks(compute: Callable[[], Value]) -> Value:
    """Run something on every rank; if it fails on one, it fails on all, and none waits.

    It may contain exchanges and further calls of this function, the same ones on all ranks.

    Raises:
        CalibrationError: If another process failed.
    """
    with errors_shared():
        value = compute()
    all_gathered(None)
    return value


@contextmanager
def errors_shared() -> Iterator[None]:
    """Send an error of the body to all ranks, which raise it at the exchange that they wait in.

    The body has to end with an exchange, so that no rank has gone on without having heard of it.
    """
    try:
        yield
    except Exception as error:  # the other ranks would wait for this one for ever
        if is_distributed() and not _is_shared(error):
            _exchange(None, error)
        raise


@contextmanager
def entered_on_all_ranks(make: Callable[[], AbstractContextManager[Value]]) -> Iterator[Value]:
    """Enter a context on every rank; if that fails on one, all ranks leave theirs with an error.

    Raises:
        CalibrationError: If it failed in another process.
    """
    with ExitStack() as stack:
        yield on_all_ranks(lambda: stack.enter_context(make()))


def _exchange(value: Any, error: Exception | None) -> list[Any]:
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, (value, None if error is None else str(error) or repr(error)))
    failed = [(source, reason) for source, (_, reason) in enumerate(gathered) if reason is not None]
    if error is None and failed:
        source, reason = failed[0]
        error = CalibrationError(
            f"Expected this to work in all processes, got an error in process {source}: {reason}"
        )
    if error is not None:
        setattr(error, _SHARED, True)
        raise error
    return [value for value, _ in gathered]


def _is_shared(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, _SHARED, False):
            return True
        error = error.__cause__ or error.__context__
    return False


def share_of(total: int, index: int, shares: int) -> int:
    """How many of ``total`` things the ``index``-th of several shares gets.

    Example:
        >>> [share_of(8, index, 3) for index in range(3)]
        [3, 3, 2]
    """
    whole, remainder = divmod(total, shares)
    return whole + (index < remainder)
