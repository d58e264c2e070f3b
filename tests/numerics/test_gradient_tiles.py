from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchprune_bayes._numerics.gradient_tiles import mean_squares


class _Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation makes new."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.entries = max(self.entries, out.numel())
        return out


@pytest.mark.parametrize("shape", [(40, 1 << 17), (1, 3000, 500), (1, 3, 5), (2, 600, 2000)])
def test_mean_squares_take_little_memory_in_any_shape(shape: tuple[int, ...]) -> None:
    gradients = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with _Largest() as largest:
        found = mean_squares(gradients)
    expected = gradients.double().square().mean(-2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
    assert found.dtype == torch.float64
    assert largest.entries <= max(1 << 20, found.numel())
