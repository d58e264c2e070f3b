from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist, shuffled_batches
from tests.references.second_order import gradients_one_by_one
from torchprune_bayes import Calibration, DiagonalFisher, LayerCurvature, prune_global
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (24,), generator=generator)


def _calibration(model: nn.Module, **options: Any) -> Calibration:
    return Calibration(model, [_data()], cross_entropy, **options)


def test_scores_are_those_of_gradients_taken_one_by_one() -> None:
    model = _model()
    calibration = _calibration(model)
    decision = DiagonalFisher(0.5, calibration=calibration).decide(calibration.space)
    rows = gradients_one_by_one(model, calibration.space.names, *_data(), cross_entropy)
    weights = calibration.space.values()
    expected = {n: weights[n].square() * g.square().sum(0) / 48 for n, g in rows.items()}
    assert decision.scores is not None
    torch.testing.assert_close(decision.scores, expected)
    joined = torch.cat([score.flatten() for score in expected.values()])
    threshold = joined.sort().values[25]  # 25 of 50 go
    for name, mask in decision.masks.items():
        assert torch.equal(mask, expected[name] >= threshold)
    assert decision.updates is None
    assert decision.info["gradients"] == 24


def test_scope_layer_prunes_each_tensor_alike() -> None:
    calibration = _calibration(_model())
    masks = prune_global(
        None, DiagonalFisher, amount=0.5, calibration=calibration, scope="layer"
    ).masks
    assert [int(mask.sum()) for mask in masks.values()] == [15, 10]


def test_draws_other_samples_with_another_seed() -> None:
    x, y = _data()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    calibrations = [
        Calibration(_model(), loader, cross_entropy, num_samples=8, seed=seed) for seed in (0, 0, 1)
    ]
    state = torch.get_rng_state()
    first, again, other = (
        DiagonalFisher(0.5, calibration=calibration).decide(calibration.space).scores
        for calibration in calibrations
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fitted_statistic_takes_the_place_of_a_pass() -> None:
    calibration = _calibration(_model())
    fisher = LayerCurvature().fit(calibration)
    expected = DiagonalFisher(0.5, calibration=calibration).decide(calibration.space).masks
    found = prune_global(None, DiagonalFisher, amount=0.5, curvature=fisher).masks
    torch.testing.assert_close(found, expected)


def test_a_fitted_statistic_serves_one_of_its_tensors_too() -> None:
    model = _model()
    fisher = LayerCurvature().fit(_calibration(model))
    twin = copy.deepcopy(model)
    hook = DiagonalFisher.apply(model[2], "weight", amount=0.5, curvature=fisher)
    expected = DiagonalFisher.apply(twin[2], "weight", amount=0.5, calibration=_calibration(twin))
    assert torch.equal(model[2].weight_mask, twin[2].weight_mask)
    assert int(model[2].weight_mask.sum()) == 10
    assert not vars(hook).get("curvature")
    assert not vars(expected).get("calibration")


def test_refuses_a_statistic_from_before_the_last_pruning() -> None:
    calibration = _calibration(_model())
    fisher = LayerCurvature().fit(calibration)
    prune_global(None, DiagonalFisher, amount=0.5, calibration=calibration)
    with pytest.raises(AlignmentError, match="other entries: fit it again"):
        prune_global(None, DiagonalFisher, amount=0.5, curvature=fisher)


def test_needs_data() -> None:
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, DiagonalFisher, amount=0.5)


def test_one_threshold_per_layer_reproduces_the_published_accuracy(shared_data: Path) -> None:
    train_x, train_y, test_x, test_y = load_mnist(shared_data)
    loader = shuffled_batches(train_x, train_y)
    found = []
    for seed in range(3):
        model = load_mlpnet(shared_data)
        calibration = Calibration(model, loader, cross_entropy, num_samples=4096, seed=seed)
        prune_global(None, DiagonalFisher, amount=0.95, calibration=calibration, scope="layer")
        found.append(accuracy(model, test_x, test_y))
    assert 18.0 < sum(found) / 3 < 23.0
