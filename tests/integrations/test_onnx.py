from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from torchprune_bayes.structured import shrink
from torchprune_bayes.structured.importances.magnitude import L1FilterImportance


def test_a_shrunk_model_exports_to_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    ).eval()
    example = torch.randn(1, 3, 6, 6)
    shrink(model, example, L1FilterImportance(), sparsity=0.5, target="channels")
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (example,), path, dynamo=True)
    loaded = onnx.load(path)
    sizes = {tuple(tensor.dims) for tensor in loaded.graph.initializer}
    assert (4, 3, 3, 3) in sizes
    feed = {loaded.graph.input[0].name: example.numpy()}
    [found] = reference.ReferenceEvaluator(loaded).run(None, feed)
    torch.testing.assert_close(torch.as_tensor(found), model(example).detach())
