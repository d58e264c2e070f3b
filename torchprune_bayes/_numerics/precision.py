"""Where float64 arithmetic takes place: on a tensor's own device, or on the CPU if it has none.

In plain words: Gram matrices, their factorisations and sums over many weights are done in float64,
which some accelerators (Apple's MPS) do not have. On those, such a tensor is moved to the CPU
first. Every conversion to float64 in the library passes through here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_SURE = ("cpu", "cuda", "meta")


def has_float64(device: torch.device | str) -> bool:
    """Whether tensors of float64 can be made on a device; it is asked, not looked up.

    Example:
        >>> has_float64("cpu")
        True
    """
    device = torch.device(device)
    if device.type in _SURE:
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def float64_device(device: torch.device | str) -> torch.device:
    """The device itself if it has float64, else the CPU.

    Example:
        >>> float64_device("cpu")
        device(type='cpu')
    """
    device = torch.device(device)
    return device if has_float64(device) else _CPU


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, as :func:`wide` where that is float64.

    Example:
        >>> in_dtype(torch.ones(2), torch.float32)
        tensor([1., 1.])
    """
    return wide(tensor) if dtype == torch.float64 else tensor.to(dtype)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device or on the CPU if that has no float64.

    Use it in the place of ``tensor.double()``; what is combined with the result must pass through
    here too, or be moved to its device.

    Example:
        >>> wide(torch.ones(2))
        tensor([1., 1.], dtype=torch.float64)
    """
    return tensor.to(float64_device(tensor.device), torch.float64)
