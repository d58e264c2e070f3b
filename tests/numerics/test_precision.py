from __future__ import annotations

import pytest
import torch

from torchprune_bayes._numerics import precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_kept(dtype: torch.dtype) -> None:
    x = torch.randn(5).to(dtype)
    assert precision.wide(x).dtype == torch.float64
    assert torch.equal(precision.wide(x).to(dtype), x)


def test_float64_is_not_copied() -> None:
    x = torch.randn(5, dtype=torch.float64)
    assert precision.wide(x) is x


def test_a_device_that_refuses_float64_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch, "zeros", refuse)
    assert not precision.has_float64("mps")
    assert precision.float64_device("mps") == torch.device("cpu")
    assert precision.float64_device("cuda:1") == torch.device("cuda:1")
