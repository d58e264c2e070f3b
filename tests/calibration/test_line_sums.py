"""Sums of weights times gradients along dimensions, against gradients that are formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from tests.contracts.state import unchanged
from tests.structured.models import SMALL, build, images
from torchprune_bayes import Calibration
from torchprune_bayes.calibration.line_sums import Lines, line_sums
from torchprune_bayes.errors import CalibrationError


class Tokens(nn.Module):
    """Layers over tokens ``[n, 7, 4]``, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(4, 4), nn.Linear(4, 4, bias=False)
        self.across, self.last = nn.Conv1d(4, 6, 3, stride=2, groups=2), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return self.last(self.across(x.mT).flatten(1))


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    if name != "tokens":
        return build(name).double(), images(6).double(), torch.arange(6) % 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Tokens().double().eval(), torch.randn(6, 7, 4).double()
    return model, x, torch.arange(6) % 3


def calibrated(name: str, **options: Any) -> Calibration:
    model, x, y = case(name)
    return Calibration(model, [(x[:4], y[:4]), (x[4:], y[4:])], cross_entropy, **options)


def by_gradients(calibration: Calibration, lines: Lines) -> dict[tuple[str, int], Tensor]:
    values = calibration.space.values()
    rows = torch.cat([*calibration.gradients()])
    parts = rows.split([value.numel() for value in values.values()], dim=1)
    expected = {}
    for (name, value), part in zip(values.items(), parts, strict=True):
        for dim in lines[name]:
            products = part.reshape(-1, *value.shape) * value
            expected[name, dim] = (
                products.movedim(dim + 1, 1).reshape(len(part), value.shape[dim], -1).sum(2)
            )
    return expected


@pytest.mark.parametrize("mini_batch", [1, 2])
@pytest.mark.parametrize("name", [*SMALL, "tokens"])
def test_sums_are_those_of_gradients(name: str, mini_batch: int) -> None:
    calibration = calibrated(name, mini_batch=mini_batch)
    lines = {n: range(value.ndim) for n, value in calibration.space.values().items()}
    expected = by_gradients(calibration, lines)
    with unchanged(calibration.model):
        found = [*line_sums(calibration, lines)]
    for line, sums in expected.items():
        torch.testing.assert_close(torch.cat([each[line] for each in found]), sums)


def test_patches_of_a_few_samples_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = calibrated("vgg")
    lines = dict.fromkeys(calibration.space.names, (0, 1))
    whole = [*line_sums(calibration, lines)]
    monkeypatch.setattr(
        "torchprune_bayes.layer_kinds.outer_products.PATCH_BYTES", {"cpu": 1, "cuda": 1}
    )
    for before, now in zip(whole, line_sums(calibration, lines), strict=True):
        for line, sums in before.items():
            torch.testing.assert_close(now[line], sums)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    calibration = calibrated("tokens")
    with torch.no_grad():
        calibration.model.get_parameter("last.weight")[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="finite"):
        next(line_sums(calibration, {"last.weight": (1,)}))
