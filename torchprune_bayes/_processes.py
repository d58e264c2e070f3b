"""What several processes of ``torch.distributed`` say to one another; one alone talks to itself.

In plain words: whoever fails must tell the others, which otherwise wait for it until a time-out. So
every exchange carries the reason of whoever has failed before it, and raises it in all. An error
that all have heard of is not told again, however many exchanges it leaves on its way out.

By hand, since the utilities of torch.distributed and accelerate raise an error where it happened
and leave the other processes waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from torchprune_bayes.errors import CalibrationError

Value = TypeVar("Value")

_TOLD = "_told_to_all_processes"


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
    """Collect a picklable value from all processes, in the order of their ranks.

    Raises:
        CalibrationError: If another process failed before it came here.
    """
    return _exchange(value, None) if several() else [value]


def together(compute: Callable[[], Value]) -> Value:
    """Run something in every process; if it fails in one, it fails in all, and none waits.

    Inside, exchanges and further calls of this function may come up, the same in all processes, as
    long as none fails.

    Raises:
        CalibrationError: If another process failed.
    """
    with telling():
        value = compute()
    everywhere(None)
    return value


@contextmanager
def telling() -> Iterator[None]:
    """Tell all processes of what fails in the body; those that are well hear of it where they wait.

    The last thing that the body does has to be an exchange, so that there is no process that has
    gone on and hears of nothing.
    """
    try:
        yield
    except Exception as error:  # the others would wait for this process for ever
        if several() and not _was_told(error):
            _exchange(None, error)
        raise


@contextmanager
def entered_together(make: Callable[[], AbstractContextManager[Value]]) -> Iterator[Value]:
    """Enter a context in every process; if that fails in one, all leave theirs with an error.

    Raises:
        CalibrationError: If it failed in another process.
    """
    with ExitStack() as stack:
        yield together(lambda: stack.enter_context(make()))


def _exchange(value: Any, error: Exception | None) -> list[Any]:
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (value, None if error is None else str(error) or repr(error)))
    failed = [(source, reason) for source, (_, reason) in enumerate(found) if reason is not None]
    if error is None and failed:
        source, reason = failed[0]
        error = CalibrationError(
            f"Expected this to work in all processes, got an error in process {source}: {reason}"
        )
    if error is not None:
        setattr(error, _TOLD, True)
        raise error
    return [value for value, _ in found]


def _was_told(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, _TOLD, False):
            return True
        error = error.__cause__ or error.__context__
    return False
