"""Weights of a shrunk model are pruned by any method, and what both removed stays removed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.contracts.cases import options_of
from tests.structured.models import build, images
from torchprune_bayes import Calibration, bake, prunable_parameters, registered_methods
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.methods import prune_global
from torchprune_bayes.structured import shrink

UNSTRUCTURED = sorted(name for name, e in registered_methods().items() if not e.is_structured)


def calibrated(model: nn.Module) -> Calibration:
    x = images(32)
    return Calibration(model, [(x, torch.arange(32) % 5)], cross_entropy)


@pytest.fixture(scope="module")
def shrunk() -> nn.Module:
    model = build("vgg")
    report = shrink(model, images(), calibrated(model), sparsity=0.4, evaluations=8)
    assert report.repairs
    return model


@pytest.mark.parametrize("name", UNSTRUCTURED)
def test_any_method_prunes_what_shrinking_left(name, shrunk):
    model = copy.deepcopy(shrunk)
    shapes = {key: value.shape for key, value in model.named_parameters()}
    params = prunable_parameters(model)
    options = options_of(name, model, params)
    if options:
        options["calibration"] = Calibration(
            model, [(images(16), torch.arange(16) % 5)], cross_entropy, params=params
        )
    prune_global(params, name, amount=0.5, **options)
    bake(model)
    assert {key: value.shape for key, value in model.named_parameters()} == shapes
    weights = [getattr(*pair) for pair in params]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.5, abs=0.02)
    assert model(images()).isfinite().all()


def test_pruned_weights_are_made_up_for_on_top_of_the_repair(shrunk):
    x, dense = images(32), build("vgg")
    errors = {}
    for name in ("magnitude", "sparsegpt"):
        model = copy.deepcopy(shrunk)
        params = prunable_parameters(model)
        more = {"calibration": calibrated(model)} if name == "sparsegpt" else {}
        prune_global(params, name, amount=0.5, **more)
        bake(model)
        with torch.no_grad():
            errors[name] = float((model(x) - dense(x)).square().mean())
    assert errors["sparsegpt"] < errors["magnitude"]


def test_masks_are_made_permanent_before_shrinking(shrunk):
    model = copy.deepcopy(shrunk)
    prune_global(prunable_parameters(model), "magnitude", amount=0.5)
    with pytest.raises(ParameterError, match=r"call `bake\(model\)` first"):
        shrink(model, images(), calibrated(model), sparsity=0.1)
    bake(model)
    report = shrink(model, images(), calibrated(model), sparsity=0.1, evaluations=8)
    assert report.parameters.sparsity >= 0.1


def test_a_repair_that_fills_pruned_weights_says_so(caplog):
    model, repaired = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)), "least_squares"
    torch.nn.init.orthogonal_(model[2].weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    for sparse in (False, True):
        if sparse:
            with torch.no_grad():
                model[2].weight.view(-1)[::5] = 0.0
        again, targets = copy.deepcopy(model), model(x).detach()
        calibration = Calibration(again, [(x, targets + 0.1)], mse_loss)
        report = shrink(again, x[:2], calibration, sparsity=0.3, repair=repaired)
        assert report.repairs[0].taken
        assert ("zero before it" in caplog.text) == sparse
    assert "`2.weight`" in caplog.text
