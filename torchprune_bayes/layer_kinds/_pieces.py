"""How much is multiplied out, or cut out of images, at one time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# What is multiplied out at one time, so that on a CPU it is squared where it was made, in a cache.
CACHE_BYTES = {"cpu": 2**21, "cuda": 2**28}
# Patches of images that are cut out at one time.
PATCH_BYTES = {"cpu": 2**25, "cuda": 2**28}


def budget_of(device: torch.device, budgets: dict[str, int]) -> int:
    """Bytes for a device; accelerators other than CUDA take its budget."""
    return budgets.get(device.type, budgets["cuda"])


def parts(length: int, bytes_each: int, budget: int) -> Iterator[slice]:
    """Slices of a range, each of as many items as fit the budget in bytes, one at least."""
    step = max(1, budget // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
