"""What runs before a change is played back, and the losses are the very same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from tests.gates.cases import FAMILIES, Logits, built
from tests.structured.models import SMALL, build, images
from torchprune_bayes import Calibration
from torchprune_bayes.structured import LossCurve, find_groups, measure_curves
from torchprune_bayes.structured._playback import Calls, Playback


def case(name: str) -> tuple[nn.Module, Any, Calibration]:
    if name in SMALL:
        model, x = build(name), images(12)
        return model, x[:2], Calibration(model, [(x, torch.arange(12) % 5)], cross_entropy)
    model, x = built(name)
    if isinstance(model, Logits):  # the families know the model, not what it is wrapped in
        model = model.model
        batch = {"input_ids": x.repeat(3, 1)}
        batch["labels"] = batch["input_ids"] if name == "gpt2" else torch.arange(6) % 2
        return model, {"input_ids": x}, Calibration(model, [batch])
    return (
        model,
        x,
        Calibration(model, [(x.repeat(3, 1, 1, 1), torch.arange(6) % 3)], cross_entropy),
    )


def curves_of(name: str, **options: Any) -> list[LossCurve]:
    model, inputs, calibration = case(name)
    groups = find_groups(model, inputs, **options)
    orders = {group.name: torch.arange(group.units) for group in groups}
    with unchanged(model):
        return measure_curves(calibration, groups, orders, evaluations=3 * len(groups))


@contextmanager
def nothing_played() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Playback, "_is_exact", lambda *args: False)
        yield


@pytest.mark.parametrize("name", [*SMALL, "timm-vit", "gpt2", "bert"])
def test_curves_are_the_very_same(name: str) -> None:
    options = {"heads": "dimensions"} if name in FAMILIES else {}
    found = curves_of(name, **options)
    with nothing_played():
        assert curves_of(name, **options) == found


def calls_of(model: nn.Module, path: str) -> list[int]:
    calls: list[int] = []
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_modules_in_front_run_for_the_first_point_alone() -> None:
    model, inputs, calibration = case("resnet")
    groups = find_groups(model, inputs)[-1:]  # what the last block gives
    orders = {group.name: torch.arange(group.units) for group in groups}
    list(calibration.batches())  # checked once
    calls = calls_of(model, "3.conv1")
    [curve] = measure_curves(calibration, groups, orders)
    played = len(calls)
    calls.clear()
    with nothing_played():
        measure_curves(calibration, groups, orders)
    assert len(curve.removed) == 9
    assert len(calls) - played == 7  # all points but the first


def batches_of(model: nn.Module) -> tuple[Calibration, list[Any]]:
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    calibration = Calibration(model, [(x[:4], y[:4]), (x[4:], y[4:])], cross_entropy)
    return calibration, list(calibration.batches())


class Summing(nn.Linear):
    """Leaves the sum of its inputs behind, beside what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        self.total = x.sum()
        return super().forward(x)


class Chain(nn.Module):
    """Three layers, of which the last may be given what the first one left behind."""

    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = Summing(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.second(self.first(2 * x)))
        return self.third(x * self.first.total if self.reads else x)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("room", [1e9, 0.0])
def test_losses_are_right_whatever_modules_leave_behind(reads: bool, room: float) -> None:
    torch.manual_seed(0)
    model = Chain(reads=reads)
    calibration, batches = batches_of(model)
    calls = Calls(calibration, batches[0])
    assert calls.done_before([model.third]) == [model.first, model.second]
    assert calls.done_before([model.first]) == calls.done_before([nn.Linear(1, 1)]) == []

    def loss_of(batch: Any) -> float:
        return float(calibration.loss(None, batch))

    expected = [loss_of(batch) for batch in batches]
    playback = Playback(calls, room, batches, loss_of)
    for _ in range(3):
        assert playback.losses([model.third]) == expected
    assert bool(playback._outputs) == (room > 0 and not reads)
    assert "forward" not in vars(model.first)
