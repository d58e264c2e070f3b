from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist, shuffled_batches
from tests.references.second_order import dense_hessian
from torchprune_bayes import Calibration, HessianDiagonal, prune_global
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (24,), generator=generator)


def _calibration(model: nn.Module, **options: Any) -> Calibration:
    return Calibration(model, [_data()], cross_entropy, **options)


def test_scores_are_those_of_the_dense_hessian() -> None:
    model = _model()
    calibration = _calibration(model, mini_batch=4)
    decision = HessianDiagonal(0.5, calibration=calibration).decide(calibration.space)
    names = calibration.space.names
    hessian = dense_hessian(model, names, *_data(), cross_entropy)
    weights = torch.cat([value.flatten() for value in calibration.space.values().values()])
    expected = weights.square() * hessian.diagonal().abs() / 2
    assert (hessian.diagonal() < 0).any()  # so that the absolute value is put to the test
    assert decision.scores is not None
    found = torch.cat([decision.scores[name].flatten() for name in names])
    torch.testing.assert_close(found, expected)
    kept = torch.cat([decision.masks[name].flatten() for name in names])
    assert torch.equal(kept, expected >= expected.sort().values[25])
    assert decision.updates is None


def test_predicts_the_rise_of_a_quadratic_loss_at_its_minimum() -> None:
    x, _ = _data()
    layer = nn.Linear(6, 1, bias=False).double()
    y = x @ layer.weight.detach().mT
    calibration = Calibration(layer, [(x, y)], nn.functional.mse_loss)
    decision = HessianDiagonal(1, calibration=calibration).decide(calibration.space)
    rises = []
    for i in range(6):
        without = layer.weight.detach().clone()
        without[0, i] = 0.0
        rises.append(nn.functional.mse_loss(x @ without.mT, y))
    assert decision.scores is not None
    torch.testing.assert_close(decision.scores["weight"][0], torch.stack(rises))
    assert int(decision.masks["weight"].int().argmin()) == int(torch.stack(rises).argmin())


def test_scope_layer_prunes_each_tensor_alike() -> None:
    calibration = _calibration(_model())
    masks = prune_global(
        None, HessianDiagonal, amount=0.5, calibration=calibration, probes=2, scope="layer"
    ).masks
    assert [int(mask.sum()) for mask in masks.values()] == [15, 10]


def test_pruning_again_scores_what_is_left() -> None:
    model = _model()
    calibration = _calibration(model)
    first = prune_global(None, HessianDiagonal, amount=0.5, calibration=calibration).masks
    second = prune_global(None, HessianDiagonal, amount=0.5, calibration=calibration).masks
    assert sum(int(mask.sum()) for mask in second.values()) == 13  # of 25, round(12.5) go
    assert not any((second[name] & ~mask).any() for name, mask in first.items())


def test_probes_are_seeded_by_the_calibration_alone() -> None:
    state = torch.get_rng_state()
    scores = []
    for seed in (0, 0, 1):
        calibration = _calibration(_model(), seed=seed)
        expected = torch.get_rng_state()
        method = HessianDiagonal(0.5, calibration=calibration, probes=3)
        decision = method.decide(calibration.space)
        assert torch.equal(torch.get_rng_state(), expected)
        assert decision.scores is not None
        scores.append(decision.scores["0.weight"])
    torch.set_rng_state(state)
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_refuses_impossible_probes_and_missing_data() -> None:
    with pytest.raises(ArgumentError, match="probes"):
        HessianDiagonal(0.5, probes=0)
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, HessianDiagonal, amount=0.5)


def test_noise_of_few_probes_does_not_prune_what_matters(shared_data: Path) -> None:
    train_x, train_y, test_x, test_y = load_mnist(shared_data)
    loader = shuffled_batches(train_x, train_y)
    model = load_mlpnet(shared_data)
    calibration = Calibration(model, loader, cross_entropy, num_samples=1000)
    with pytest.raises(ArgumentError, match="got 32360"):
        prune_global(None, HessianDiagonal, amount=0.5, calibration=calibration)
    prune_global(None, HessianDiagonal, amount=0.5, calibration=calibration, probes=16)
    assert accuracy(model, test_x, test_y) > 93.0  # dense 93.97; ranked by sign 56 to 65
