"""Seconds that running a model takes, by the clock that other processes disturb least."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn


def seconds_of(model: nn.Module, run: Callable[[], object]) -> float:
    """Time one run of a model.

    On a CPU with one thread this is the processor's time, in which waiting for other processes does
    not count; otherwise time on the wall, until an accelerator has done its work.

    Args:
        model: The model, which tells the device.
        run: Runs it.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> seconds_of(model, lambda: model(torch.zeros(1, 2))) >= 0.0
        True
    """
    tensor = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    on_cpu = tensor.device.type == "cpu"
    clock = time.process_time if on_cpu and torch.get_num_threads() == 1 else time.perf_counter
    if not on_cpu:
        torch.accelerator.synchronize(tensor.device)
    start = clock()
    run()
    if not on_cpu:
        torch.accelerator.synchronize(tensor.device)
    return clock() - start
