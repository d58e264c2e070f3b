"""How much memory a calculation may take, and what each part of it gets.

In plain words: one object owns all fractions of the budget, so that they can be read in one place
and add up to the whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from torchprune_bayes._checks import check_positive
from torchprune_bayes.errors import ArgumentError

_MIB = 2**20
_SHARE_OF_FREE = 0.5
_UNKNOWN = 4096.0  # MiB, where the operating system does not say what is free


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes for everything held beside the model at one time.

    Half of it is for gradients that are kept in memory; what does not fit goes to a scratch file.
    The other half is for work: a group of Fisher blocks, and the activations and gradients of one
    chunk of samples, which are not needed at the same time.

    Args:
        total_bytes: The whole budget.

    Example:
        >>> budget = MemoryBudget.of(64.0, "cpu")
        >>> budget.total_mb, budget.gradients_bytes == budget.total_bytes // 2
        (64.0, True)
    """

    total_bytes: int

    @classmethod
    def of(cls, memory_mb: float | Literal["auto"], device: torch.device | str) -> MemoryBudget:
        """The budget for an option ``memory_mb``.

        Args:
            memory_mb: MiB, or ``"auto"``: half of what is free now on the device, and on a CPU
                within the limits of the process's control group.
            device: Where the calculation takes place.

        Raises:
            ArgumentError: If the number is not positive, or another word than ``"auto"``.
        """
        if memory_mb == "auto":
            return cls(int(_SHARE_OF_FREE * free_bytes(torch.device(device))))
        if isinstance(memory_mb, str):
            raise ArgumentError(f"Expected a number or 'auto' for `memory_mb`, got {memory_mb!r}.")
        check_positive("memory_mb", memory_mb)
        return cls(int(memory_mb * _MIB))

    @property
    def total_mb(self) -> float:
        """The whole budget in MiB."""
        return self.total_bytes / _MIB

    @property
    def gradients_bytes(self) -> int:
        """For gradients that are kept in memory."""
        return self.total_bytes // 2

    @property
    def block_bytes(self) -> int:
        """For the group of Fisher blocks that is factorised at one time, with its float64 copy."""
        return self.total_bytes // 8

    @property
    def factor_bytes(self) -> int:
        """For Gram matrices that are kept from one sweep to the next."""
        return self.total_bytes // 8

    @property
    def chunk_bytes(self) -> int:
        """For activations and gradients of the samples that are differentiated at one time."""
        return self.total_bytes // 4

    @property
    def copy_bytes(self) -> int:
        """For a copy of the gradients of what remains, once no more gradients are computed."""
        return self.total_bytes // 8

    @property
    def held_out_bytes(self) -> int:
        """For held-out samples, which are drawn once and kept."""
        return self.total_bytes // 8


def free_bytes(device: torch.device) -> int:
    """Memory that is free now on a device, as far as it says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return int(_UNKNOWN * _MIB)
    sizes = [_available(), _left_of_control_group()]
    return min([size for size in sizes if size], default=int(_UNKNOWN * _MIB))


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _left_of_control_group() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = (folder / "memory.current").read_text(encoding="ascii").strip()
        return None if limit == "max" else max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return None
