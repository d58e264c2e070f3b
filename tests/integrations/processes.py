"""Running functions in other processes, two of which may talk through gloo.

They are forked from a server that has never differentiated anything, because autograd does not work
in the fork of a process that has used it, as one that ran other tests has.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState

PROCESSES = 2
KILLS = 20
fresh = multiprocessing.get_context("forkserver")
# What is imported late, at the first gradient, takes seconds in every process otherwise.
_IMPORTED = ["torch._dynamo", "torch.distributed.tensor", "accelerate", "transformers"]
fresh.set_forkserver_preload([*_IMPORTED, "torchprune_bayes"])


def in_two_processes(function: Callable[..., Any], *args: Any) -> None:
    """Run ``function(*args)`` in two processes that talk through gloo; fails if it fails in one.

    They are forked, so they end without Python's finalization, during which a thread of gloo that
    still holds a tensor ends the process with an abort.
    """
    process = fresh.Process(target=_launch, args=(function, args))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{function.__name__} failed in another process"


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


def _launch(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        # Newer Pythons warn about forking, which is how a function of a test can be run.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        debug_launcher(_checked, (function, args), num_processes=PROCESSES)


def _checked(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    forget_accelerator()
    assert os.environ["WORLD_SIZE"] == str(PROCESSES)
    function(*args)


def forget_accelerator() -> None:
    """Undo what accelerate remembers of earlier accelerators of this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def wait_for(progress: Any, wanted: int, process: BaseProcess) -> None:
    while progress.value < wanted and process.is_alive():
        time.sleep(1e-4)


def kill_often(target: Callable[..., Any], args: tuple[Any, ...], progress: Any, every: int) -> int:
    """Start ``target`` again and again and kill it within its next ``every`` steps.

    ``progress`` is a value without a lock, which would stay locked by a process killed with it.
    """
    kills = 0
    while kills < KILLS:
        process = fresh.Process(target=target, args=args)
        process.start()
        wait_for(progress, progress.value + random.randrange(1, every), process)
        time.sleep(random.random() * 0.004)  # so that it is hit anywhere in a step, saving included
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was done before
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    return kills
