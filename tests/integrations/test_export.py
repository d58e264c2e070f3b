"""Shrunk models go through PyTorch's own exporters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.importances.magnitude import L1FilterImportance


def resnet18() -> nn.Module:
    return timm.create_model("resnet18", num_classes=5)


def vit_tiny() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5
    )


def distilbert() -> nn.Module:
    config = DistilBertConfig(
        vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=16
    )
    return DistilBertForSequenceClassification(config)


def logits(output: Any) -> Tensor:
    found: Tensor = getattr(output, "logits", output)
    return found


def shrunk(build: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor], int]:
    """A model with half of its parameters, its inputs, and how many it had."""
    torch.manual_seed(0)
    model = build().eval()
    before = sum(p.numel() for p in model.parameters())
    if build is distilbert:
        inputs = {"input_ids": torch.randint(1, 50, (2, 7)), "attention_mask": torch.ones(2, 7)}
    else:
        inputs = {"x": torch.randn(2, 3, 32, 32)}
    shrink(model, inputs, L1FilterImportance(), sparsity=0.5)
    return model, inputs, before


@pytest.mark.parametrize("build", [resnet18, vit_tiny, distilbert])
def test_shrunk_models_export(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, inputs, before = shrunk(build)
    torch.export.save(torch.export.export(model, (), inputs), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert sum(p.numel() for p in program.parameters()) <= 0.5 * before
    with torch.no_grad():
        found, expected = logits(program.module()(**inputs)), logits(model(**inputs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("build", [resnet18, vit_tiny, distilbert])
def test_shrunk_models_export_to_onnx(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, inputs, before = shrunk(build)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (), path, kwargs=inputs, dynamo=True)
    loaded = onnx.load(path)
    entries = [tensor.dims for tensor in loaded.graph.initializer]
    assert sum(int(torch.tensor(list(dims)).prod()) for dims in entries) <= 0.55 * before
    names = [given.name for given in loaded.graph.input]
    feed = {name: inputs[name].numpy() for name in names}
    [found, *_] = ReferenceEvaluator(loaded).run(None, feed)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.as_tensor(found), logits(model(**inputs)), atol=1e-4, rtol=1e-4
        )
