"""CNIP-it: one threshold for weights and units."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured import prune_weights_and_units

X = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (32,), generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )


def calibrate(model: nn.Module) -> Calibration:
    return Calibration(model, [(X, Y)], cross_entropy)


WEIGHTS, UNITS = 8 * 9 + 64 * 9 + 24, 16


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_as_many_are_gone_as_asked_for(sparsity):
    model = net()
    found = prune_weights_and_units(model, X[:2], calibrate, sparsity)
    assert (found.weights.before, found.units.before) == (WEIGHTS, UNITS)
    left = found.weights.after + found.units.after
    assert left == WEIGHTS + UNITS - round(sparsity * (WEIGHTS + UNITS))
    assert model[0].out_channels + model[2].out_channels == found.units.after
    kept = sum(int((m.weight != 0).sum()) for m in model if hasattr(m, "weight"))
    assert kept == found.weights.after == sum(int(mask.sum()) for mask in found.masks.values())
    assert torch.isfinite(model(X)).all()


def test_one_threshold_divides_weights_and_units():
    """One step by hand: elasticities of gates on weights and on what is read of a unit."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    data = torch.randn(16, 4, dtype=torch.float64), torch.randint(2, (16,))
    loss = cross_entropy(model(data[0]), data[1])
    parts = torch.autograd.grad(loss, [model[0].weight, model[2].weight])
    changes = [
        w.detach() * g for w, g in zip((model[0].weight, model[2].weight), parts, strict=True)
    ]
    weights = torch.cat([c.abs().flatten() for c in changes]) / loss.item()
    units = changes[1].sum(0).abs() / loss.item()
    pool = torch.cat([weights, units]).sort(descending=True).values
    keep = len(pool) - round(0.4 * len(pool))
    gone = int((units < pool[keep - 1]).sum())
    assert 0 < gone < 6
    found = prune_weights_and_units(
        *(model, data[0], lambda m: Calibration(m, [data], cross_entropy), 0.4), steps=0
    )
    assert found.units.after == 6 - gone
    assert found.units.after + found.weights.after == keep


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"sparsity": 0.5, "steps": -1}])
def test_wrong_options_are_refused_before_anything_changes(options):
    model = net()
    with pytest.raises(ArgumentError):
        prune_weights_and_units(model, X[:2], calibrate, **options)
    assert model[0].out_channels == 8
