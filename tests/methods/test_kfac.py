from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.references.mlpnet import accuracy, load_mlpnet, load_mnist, shuffled_batches
from tests.references.second_order import damped_kronecker_product
from torchprune_bayes import KFAC, Calibration, KroneckerFactors, Magnitude, prune_global
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    ParameterError,
)


def _model() -> Any:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 3, 2), nn.Linear(12, 4)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), linear).double()


def _calibration(model: nn.Module, **options: Any) -> Calibration:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 2, 3, 3, generator=generator).to(next(model.parameters()).dtype)
    y = torch.randint(4, (32,), generator=generator)
    return Calibration(model, [(x, y)], cross_entropy, **options)


def _dense_blocks(
    calibration: Calibration, damping: float, *, pi: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Damped Fisher and flat weights by name."""
    factors = KroneckerFactors().fit(calibration)
    return {
        name: (
            damped_kronecker_product(*factors.factors(name), damping, pi=pi),
            weight.flatten(),
        )
        for name, weight in calibration.space.values().items()
    }


@pytest.mark.parametrize("pi", [False, True])
def test_equals_the_dense_matrices_of_the_paper(pi: bool) -> None:
    calibration = _calibration(_model())
    method = KFAC(0.6, calibration=calibration, damping=1e-3, pi=pi)
    decision = method.decide(calibration.space)
    assert decision.updates is not None
    assert decision.scores is not None
    for name, (fisher, weight) in _dense_blocks(calibration, 1e-3, pi=pi).items():
        inverse = torch.linalg.inv(fisher)
        scores = weight.square() / (2 * inverse.diagonal())
        torch.testing.assert_close(decision.scores[name].flatten(), scores)
        keep = decision.masks[name].flatten()
        moved = weight - inverse @ torch.where(keep, 0.0, weight / inverse.diagonal())
        expected = torch.where(keep, moved, 0.0)
        torch.testing.assert_close(decision.updates[name].flatten(), expected)
    kept = sum(int(mask.sum()) for mask in decision.masks.values())
    assert kept == 72 - round(0.6 * 72)


def test_the_update_for_one_weight_is_optimal() -> None:
    calibration = _calibration(_model())
    method = KFAC(1, calibration=calibration, damping=0.1, pi=False)
    decision = method.decide(calibration.space)
    assert decision.updates is not None
    assert decision.scores is not None
    (name,) = (name for name, mask in decision.masks.items() if not mask.all())
    fisher, weight = _dense_blocks(calibration, 0.1, pi=False)[name]
    change = decision.updates[name].flatten() - weight
    # Stationary: no kept weight can lower ½ δᵀFδ, whose value is the score.
    slope = (fisher @ change)[decision.masks[name].flatten()]
    torch.testing.assert_close(slope, torch.zeros_like(slope))
    torch.testing.assert_close(change @ fisher @ change / 2, decision.scores[name].min())


def test_with_large_damping_ranks_by_magnitude_and_moves_nothing() -> None:
    calibration = _calibration(_model())
    space = calibration.space
    decision = KFAC(0.5, calibration=calibration, damping=1e12, pi=False).decide(space)
    by_size = Magnitude(0.5).decide(space).masks
    torch.testing.assert_close(decision.masks, by_size)
    assert decision.updates is not None
    expected = {name: value * by_size[name] for name, value in space.values().items()}
    torch.testing.assert_close(decision.updates, expected, rtol=1e-4, atol=0)


def test_only_selects_without_update() -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = _calibration(model)
    both = [
        KFAC(0.5, calibration=calibration, update=update).decide(calibration.space)
        for update in ("none", "single")
    ]
    torch.testing.assert_close(both[0].masks, both[1].masks)
    assert both[0].updates is None
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_scope_layer_prunes_each_tensor_alike() -> None:
    calibration = _calibration(_model())
    masks = prune_global(None, KFAC, amount=0.5, calibration=calibration, scope="layer").masks
    assert [int(mask.sum()) for mask in masks.values()] == [12, 24]


def test_pruning_again_leaves_the_dead_alone() -> None:
    calibration = _calibration(_model())
    first = prune_global(None, KFAC, amount=0.5, calibration=calibration).masks
    again = prune_global(None, KFAC, amount=0.5, calibration=calibration)
    assert again.updates is not None
    for name, mask in first.items():
        assert not (again.masks[name] & ~mask).any()
        assert not again.updates[name][~mask].any()
    assert sum(int(mask.sum()) for mask in again.masks.values()) == 18


def test_keeps_the_dtype_of_the_weights() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        calibration = _calibration(_model().to(dtype))
        decision = KFAC(0.5, calibration=calibration).decide(calibration.space)
        assert decision.updates is not None
        assert {value.dtype for value in decision.updates.values()} == {dtype}


def test_fitted_factors_take_the_place_of_a_pass(tmp_path: Path) -> None:
    calibration = _calibration(_model())
    factors = KroneckerFactors().fit(calibration)
    expected = KFAC(0.5, calibration=calibration).decide(calibration.space)
    found = KFAC(0.5, curvature=factors).decide(calibration.space)
    assert found.updates is not None
    torch.testing.assert_close(found.updates, expected.updates)
    factors.save(tmp_path / "factors.safetensors")
    loaded = KroneckerFactors.load(tmp_path / "factors.safetensors")
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, KFAC, amount=0.5, curvature=loaded)
    read = prune_global(None, KFAC, amount=0.5, curvature=loaded, calibration=calibration)
    torch.testing.assert_close(read.masks, expected.masks)
    with pytest.raises(AlignmentError, match="fit it again"):
        prune_global(None, KFAC, amount=0.5, curvature=factors)


def test_prunes_one_tensor_with_the_factors_of_all_and_lets_go_of_them() -> None:
    model = _model()
    factors = KroneckerFactors().fit(_calibration(model))
    hook = KFAC.apply(model[3], "weight", amount=0.5, curvature=factors)
    assert int(model[3].weight_mask.sum()) == 24
    assert vars(hook)["curvature"] is None
    assert vars(hook)["calibration"] is None


def test_refuses_impossible_options_and_layers() -> None:
    for options, word in (
        ({"damping": 0.0}, "damping"),
        ({"update": "joint"}, "update"),
        ({"scope": "network"}, "scope"),
    ):
        with pytest.raises(ArgumentError, match=word):
            KFAC(0.5, **options)
    model = nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Flatten(), nn.Linear(8, 4)).double()
    with pytest.raises(ParameterError, match=r"got `0\.weight` of Conv2d\(2, 2"):
        prune_global(None, KFAC, amount=0.5, calibration=_calibration(model))
    assert not hasattr(model[0], "weight_mask")


def test_reproduces_the_published_accuracy(shared_data: Path) -> None:
    train_x, train_y, test_x, test_y = load_mnist(shared_data)
    loader = shuffled_batches(train_x, train_y)
    found = []
    for seed in range(6):
        model = load_mlpnet(shared_data)
        calibration = Calibration(model, loader, cross_entropy, num_samples=100, seed=seed)
        prune_global(None, KFAC, amount=0.95, calibration=calibration, damping=1e-5, pi=False)
        found.append(accuracy(model, test_x, test_y))
    assert 80.5 < sum(found) / 6 < 82.5
