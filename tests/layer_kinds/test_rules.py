from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from tests.references.layer_curvature import empirical_diagonal
from torchprune_bayes import Calibration
from torchprune_bayes.curvature import LayerCurvature, trainable_parameters

SAMPLES, CLASSES = 7, 3


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _ids(*shape: int) -> Tensor:
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(3))


class Head(nn.Module):
    """A nonlinear classifier on top of any layer's output."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        mix = torch.linspace(-1, 1, flat.shape[1] * CLASSES, dtype=flat.dtype)
        return flat.tanh() @ mix.sin().view(-1, CLASSES)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ScaledRmsNorm(nn.Module):
    """Named like timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class Windows(nn.Module):
    """A layer that sees two parts of every sample as entries of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(-1, 2, 3)).reshape(len(x), -1)


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


class TiedTable(nn.Module):
    """Embeddings whose table is the output layer, and once more a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, padding_idx=1)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)).cumsum(1))


class PositionTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(5, 4), nn.Embedding(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).unsqueeze(0)
        return self.words(ids) * (1 + self.positions(places))


class Residual(nn.Module):
    """In-place activations and additions, as in residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return self.relu(out)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, 3), _normal(SAMPLES, 4)),
    "linear-no-bias": (lambda: nn.Linear(4, 3, bias=False), _normal(SAMPLES, 4)),
    "linear-3-tokens": (lambda: nn.Linear(4, 3), _normal(SAMPLES, 3, 4)),
    "linear-9-tokens": (lambda: nn.Linear(4, 3), _normal(SAMPLES, 9, 4)),
    "linear-2x3-tokens": (lambda: nn.Linear(4, 3), _normal(SAMPLES, 2, 3, 4)),
    "hf-conv1d": (lambda: Conv1D(3, 4), _normal(SAMPLES, 6, 4)),
    "hf-conv1d-pairs": (lambda: Conv1D(3, 4), _normal(SAMPLES, 2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), _normal(SAMPLES, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), _normal(SAMPLES, 3, 5, 4)),
    "conv2d-strided": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2),
        _normal(SAMPLES, 4, 7, 6),
    ),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), _normal(SAMPLES, 4, 5, 5)),
    "conv2d-same": (lambda: nn.Conv2d(3, 2, (3, 5), padding="same"), _normal(SAMPLES, 3, 5, 5)),
    "conv2d-circular": (
        lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"),
        _normal(SAMPLES, 3, 5, 5),
    ),
    "conv2d-one-position": (lambda: nn.Conv2d(3, 4, 3), _normal(SAMPLES, 3, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), _normal(SAMPLES, 2, 4, 5, 3)),
    "batch-norm-1d": (lambda: nn.BatchNorm1d(4), _normal(SAMPLES, 4)),
    "batch-norm-1d-tokens": (lambda: nn.BatchNorm1d(4), _normal(SAMPLES, 4, 3)),
    "batch-norm-2d": (lambda: nn.BatchNorm2d(4), _normal(SAMPLES, 4, 3, 2)),
    "layer-norm": (lambda: nn.LayerNorm(4), _normal(SAMPLES, 3, 4)),
    "layer-norm-two": (lambda: nn.LayerNorm((3, 4)), _normal(SAMPLES, 2, 3, 4)),
    "layer-norm-2d": (lambda: LayerNorm2d(4), _normal(SAMPLES, 4, 3, 2)),
    "rms-norm": (lambda: nn.RMSNorm(4), _normal(SAMPLES, 3, 4)),
    "rms-norm-timm": (ScaledRmsNorm, _normal(SAMPLES, 3, 4)),
    "rms-norm-hf": (lambda: LlamaRMSNorm(4, 1e-3), _normal(SAMPLES, 3, 4)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), _normal(SAMPLES, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(5, 4), _ids(SAMPLES, 6)),
    "embedding-one": (lambda: nn.Embedding(5, 4), _ids(SAMPLES)),
    "embedding-padding": (lambda: nn.Embedding(5, 4, padding_idx=1), _ids(SAMPLES, 6)),
    "windows": (Windows, _normal(SAMPLES, 4, 3)),
    "linear-twice": (lambda: Twice(nn.Linear(4, 4)), _normal(SAMPLES, 4)),
    "norm-twice": (lambda: Twice(nn.LayerNorm(4)), _normal(SAMPLES, 3, 4)),
    "conv-twice": (lambda: Twice(nn.Conv2d(2, 2, 3, padding=1)), _normal(SAMPLES, 2, 4, 4)),
    "tied-table": (TiedTable, _ids(SAMPLES, 4)),
    "position-table": (PositionTable, _ids(SAMPLES, 6)),
    "residual": (Residual, _normal(SAMPLES, 3, 4, 4)),
}


def _model(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for module in layer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return nn.Sequential(layer, Head()).double()


def _tolerance(name: str) -> float:
    return 1e-6 if name == "rms-norm-hf" else 1e-10  # Hugging Face's computes in float32


@pytest.mark.parametrize("name", LAYERS)
def test_diagonal_equals_a_loop_over_samples(name: str) -> None:
    make, x = LAYERS[name]
    model = _model(make)
    y = torch.arange(SAMPLES) % CLASSES
    pairs = trainable_parameters(model)
    expected = empirical_diagonal(model, [(x, y)], cross_entropy, pairs)
    # Samples 5 and 2, so that batches of different sizes are summed.
    calibration = Calibration(model, [(x[:5], y[:5]), (x[5:], y[5:])], cross_entropy, pairs)
    found = LayerCurvature().fit(calibration)
    diagonal = found.diagonal()
    assert diagonal.keys() == expected.keys()
    for key, value in expected.items():
        assert float(value.abs().sum()) > 0
        torch.testing.assert_close(diagonal[key], value, rtol=_tolerance(name), atol=1e-14)
    assert not any("one" in how for how in found.coverage.values()), found.coverage


@pytest.mark.parametrize("name", LAYERS)
def test_rules_are_right_without_verification(name: str) -> None:
    make, x = LAYERS[name]
    model = _model(make)
    y = torch.arange(SAMPLES) % CLASSES
    pairs = trainable_parameters(model)
    calibration = Calibration(model, [(x, y)], cross_entropy, pairs)
    found = LayerCurvature(verify=False).fit(calibration)
    for key, value in LayerCurvature().fit(calibration).diagonal().items():
        torch.testing.assert_close(found.diagonal()[key], value, rtol=_tolerance(name), atol=1e-14)


def test_groups_of_a_tied_weight_are_refused_in_one_sentence() -> None:
    from torchprune_bayes.errors import ArgumentError
    from torchprune_bayes.layer_kinds.outer_products import OuterProducts

    uses: Any = OuterProducts(_normal(1, 2, 3, 1), lambda _: _normal(1, 2, 3, 1), 6, (6, 3))
    with pytest.raises(ArgumentError, match="Expected one group"):
        uses.multiplied_out(0, slice(0, 1), torch.zeros(1))
