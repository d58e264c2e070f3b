"""Models in half precision: everything is computed in float32, and the model stays in its dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from tests.structured.models import build, images
from torchprune_bayes import Calibration
from torchprune_bayes.structured import shrink


def convolutional(dtype: torch.dtype) -> tuple[nn.Module, Any, Calibration]:
    model, x = build("resnet").to(dtype), images(24).to(dtype)
    return model, x[:2], Calibration(model, [(x, torch.arange(24) % 5)], cross_entropy)


def transformer(dtype: torch.dtype) -> tuple[nn.Module, Any, Calibration]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(config).eval().to(dtype)
        tokens = torch.randint(20, (24, 8))
    return (
        model,
        {"input_ids": tokens[:2]},
        Calibration(model, [{"input_ids": tokens, "labels": tokens}]),
    )


@pytest.mark.parametrize("build_case", [convolutional, transformer])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_default_shrinks_repairs_and_keeps_the_dtype(
    build_case: Any, dtype: torch.dtype
) -> None:
    model, example, calibration = build_case(dtype)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    report = shrink(model, example, calibration, sparsity=0.4, target="flops", evaluations=24)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before
    [repaired] = report.repairs
    assert repaired.layers
    assert all(layer.error <= layer.cut_error for layer in repaired.layers)
    whole, wanted, calibration_of_whole = build_case(torch.float32)
    same = shrink(whole, wanted, calibration_of_whole, sparsity=0.4, target="flops", evaluations=24)
    assert abs(repaired.loss_repaired - same.repairs[0].loss_repaired) < 0.1
