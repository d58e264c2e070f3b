"""FLOPs of a model without any fused kernel: the plain counter over matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops_without_fused_kernels(call: Callable[..., Any], *inputs: Any, **named: Any) -> int:
    """What ``call`` costs with attention as two batched matrix products.

    Gradients are on, since PyTorch takes the inference path of encoders without them.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), counter:
        call(*inputs, **named)
    return int(counter.get_total_flops())
