"""Exceptions at any line of the functions that change something."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest


class Interruption(BaseException):
    """Like ``KeyboardInterrupt``: no ``except Exception`` catches it."""


def interrupted_everywhere(
    prepare: Callable[[], tuple[Callable[[], Any], Any]],
    functions: Collection[str],
    stride: int = 1,
) -> Iterator[Any]:
    """Run again and again, each time with an exception ``stride`` lines later.

    Args:
        prepare: Makes what is run, and what is yielded to look at afterwards.
        functions: Names of the functions of this library in whose lines exceptions come up.
        stride: Lines from one exception to the next; more than one where a run is slow.
    """
    total = _count_lines(prepare()[0], functions)
    assert total
    for line in range(1, total + 1, stride):
        run, subject = prepare()
        with pytest.raises(Interruption):
            _run(run, functions, line)
        yield subject


def _count_lines(run: Callable[[], Any], functions: Collection[str]) -> int:
    return _run(run, functions, None)


def _leaves_a_block(frame: Any, visited: set[tuple[int, int]]) -> bool:
    """Whether this is the second visit of a ``with`` line, before its exit, which has to run."""
    place = (id(frame), frame.f_lineno)
    again = place in visited
    visited.add(place)
    source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return again and source.lstrip().startswith("with ")


def _run(run: Callable[[], Any], functions: Collection[str], stop: int | None) -> int:
    seen = 0
    visited: set[tuple[int, int]] = set()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal seen
        if event == "call":
            code = frame.f_code
            ours = "torchprune_bayes" in code.co_filename and code.co_name in functions
            visited.difference_update([p for p in visited if p[0] == id(frame)])  # of one gone
            return trace if ours else None
        if event == "line" and not _leaves_a_block(frame, visited):
            seen += 1
            if seen == stop:
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return seen
