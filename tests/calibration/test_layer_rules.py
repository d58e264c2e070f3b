"""Gradients of single samples by the rules of the layers: those that a loop gives, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from torchprune_bayes import Calibration, prunable_parameters

SAMPLES = 12


class Twice(nn.Module):
    """A layer that is called twice, and a residual stream that is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.inner(inputs)
        stream += self.inner(stream.tanh())
        return self.head(nn.functional.relu(stream, inplace=True))


class Tokens(nn.Module):
    """A layer on sequences, and the mean over their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.inner(inputs).tanh().mean(1))


class Unreached(nn.Module):
    """A layer that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)


class Named(Tokens):
    """Returns more than one thing, as the models of Hugging Face do."""

    def forward(self, inputs: Tensor) -> Any:
        logits = super().forward(inputs)
        return {"logits": logits, "pooled": (inputs.mean(), None), "scale": 2.0}


def _loss(output: Any, target: Tensor) -> Tensor:
    if isinstance(output, dict):
        return cross_entropy(output["scale"] * output["logits"], target)
    return cross_entropy(output, target)


def _images(*layers: nn.Module, size: int = 7, dimensions: int = 2) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(SAMPLES, 4, *[size] * dimensions)
    model(x)
    return model, x


def _hooked() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    prune.random_unstructured(model[0], "weight", 0.4)
    return model, torch.randn(SAMPLES, 6)


def _linear() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    return model, torch.randn(SAMPLES, 6)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": _linear,
    "twice": lambda: (Twice(), torch.randn(SAMPLES, 6)),
    "tokens": lambda: (Tokens(), torch.randn(SAMPLES, 4, 6)),
    "a mapping": lambda: (Named(), torch.randn(SAMPLES, 4, 6)),
    "unreached": lambda: (Unreached(), torch.randn(SAMPLES, 6)),
    "pruned by a hook": _hooked,
    "convolution": lambda: _images(nn.Conv2d(4, 6, 3, stride=2, padding=1)),
    "norm": lambda: _images(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)),
    "groups": lambda: _images(nn.Conv2d(4, 6, (3, 1), groups=2, dilation=2)),
    "depthwise": lambda: _images(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1)),
    "reflected": lambda: _images(nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect")),
    "one dimension": lambda: _images(nn.Conv1d(4, 6, 3), dimensions=1),
    "three dimensions": lambda: _images(nn.Conv3d(4, 2, 2), size=3, dimensions=3),
}


def _calibration(case: str, **options: Any) -> Calibration:
    torch.manual_seed(0)
    model, inputs = CASES[case]()
    model.double().eval()
    data = [(inputs.double(), torch.arange(SAMPLES) % 3)]
    return Calibration(model, data, _loss, prunable_parameters(model), **options)


@pytest.mark.parametrize("mini_batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_rules_give_the_gradients_of_the_loop(case: str, mini_batch: int) -> None:
    by_rules = _calibration(case, mini_batch=mini_batch)
    found = torch.cat(list(by_rules.gradients()))
    one_by_one = _calibration(case, mini_batch=mini_batch, vectorize=False)
    assert by_rules.engine == "layers"
    expected = torch.cat(list(one_by_one.gradients()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["linear", "groups", "pruned by a hook"])
def test_rows_are_written_where_they_are_wanted(case: str) -> None:
    expected = torch.cat(list(_calibration(case).gradients()))
    out = torch.full_like(expected, torch.nan)
    for rows in _calibration(case, memory_mb=0.01).gradients(out=out):
        assert rows.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


class Mixing(nn.Linear):
    """Subtracts the mean over the batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        found = super().forward(inputs)
        return found - 0.5 * found.mean(0, keepdim=True)


class OwnWeight(nn.Module):
    """Uses the weight of a layer without calling the layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + nn.functional.linear(inputs.square(), self.layer.weight)


@pytest.mark.filterwarnings("ignore:The loss of a batch is not the mean")
@pytest.mark.parametrize("make", [lambda: Mixing(6, 3), OwnWeight])
def test_models_for_which_the_rules_are_wrong_are_left_to_others(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make().double()
    data = [(torch.randn(SAMPLES, 6).double(), torch.arange(SAMPLES) % 3)]
    params = prunable_parameters(model)
    calibration = Calibration(model, data, cross_entropy, params)
    found = torch.cat(list(calibration.gradients()))
    one_by_one = Calibration(model, data, cross_entropy, params, vectorize=False)
    assert calibration.engine == "vmap"
    torch.testing.assert_close(found, torch.cat(list(one_by_one.gradients())))
