"""Running a function in two processes that talk through gloo."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState

PROCESSES = 2


def in_two_processes(function: Callable[..., Any], *args: Any) -> None:
    """Run ``function(*args)`` in two processes; fails if it fails in one, or if there is one."""
    with warnings.catch_warnings():
        # Newer Pythons warn about forking, which is how a function of a test can be run.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        debug_launcher(_checked, (function, args), num_processes=PROCESSES)
    _forget()


def accelerator(**options: Any) -> Accelerator:
    """An accelerator on the CPU that really is one of two."""
    found = Accelerator(cpu=True, **options)
    assert found.num_processes == PROCESSES
    return found


def save_from(rank: int, value: Any, path: Path) -> None:
    """Write what one process found, for the test to read."""
    torch.save(value, path.with_suffix(f".{rank}"))


def load_all(path: Path) -> list[Any]:
    """What all processes wrote."""
    return [torch.load(path.with_suffix(f".{rank}")) for rank in range(PROCESSES)]


def _checked(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    _forget()
    assert os.environ["WORLD_SIZE"] == str(PROCESSES)
    function(*args)


def _forget() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
