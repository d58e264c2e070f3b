from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.references.second_order import gradients_one_by_one
from torchprune_bayes import Calibration, EmpiricalFisherDiagonal
from torchprune_bayes.errors import AlignmentError, ArgumentError, CalibrationError


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _data(samples: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def _fit(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> EmpiricalFisherDiagonal:
    return EmpiricalFisherDiagonal().fit(Calibration(model, [(x, y)], cross_entropy, **options))


def test_equals_squares_of_gradients_taken_one_by_one() -> None:
    model, (x, y) = _model(), _data()
    fisher = _fit(model, x, y)
    rows = gradients_one_by_one(model, ["0.weight", "2.weight"], x, y, cross_entropy)
    for name, found in fisher.diagonal().items():
        torch.testing.assert_close(found, rows[name].square().mean(0))
    assert fisher.count == 24


def test_mini_batches_are_averaged_before_they_are_squared() -> None:
    model, (x, y) = _model(), _data()
    fisher = _fit(model, x, y, mini_batch=4)
    rows = gradients_one_by_one(model, ["0.weight"], x, y, cross_entropy)["0.weight"]
    expected = rows.unflatten(0, (6, 4)).mean(1).square().mean(0)
    torch.testing.assert_close(fisher.diagonal()["0.weight"], expected)
    assert fisher.count == 6


def test_takes_gradients_at_given_weights_of_live_entries() -> None:
    model, (x, y) = _model(), _data()
    keep = torch.arange(20).reshape(4, 5) % 3 != 0
    new = torch.ones(4, 5, dtype=torch.float64)
    calibration = Calibration(model, [(x, y)], cross_entropy, params=[(model[0], "weight")])
    fisher = EmpiricalFisherDiagonal().fit(calibration, {"0.weight": new}, {"0.weight": keep})
    with torch.no_grad():
        model[0].weight.copy_(new)
    rows = gradients_one_by_one(model, ["0.weight"], x, y, cross_entropy)["0.weight"]
    torch.testing.assert_close(fisher.diagonal()["0.weight"], rows.square().mean(0) * keep)


def test_sums_are_float64_whatever_the_model() -> None:
    x, y = _data()
    for dtype in (torch.float32, torch.bfloat16):
        fisher = _fit(_model().to(dtype), x.to(dtype), y)
        assert {value.dtype for value in fisher.diagonal().values()} == {torch.float64}


def test_merged_halves_equal_the_whole() -> None:
    model, (x, y) = _model(), _data()
    merged = _fit(model, x[:10], y[:10]).merge(_fit(model, x[10:], y[10:]))
    whole = _fit(model, x, y)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.diagonal(), whole.diagonal())


def test_refuses_to_merge_other_tensors_or_entries() -> None:
    model, (x, y) = _model(), _data()
    whole = _fit(model, x, y)
    calibration = Calibration(model, [(x, y)], cross_entropy, params=[(model[0], "weight")])
    with pytest.raises(AlignmentError, match="the same tensors"):
        whole.merge(EmpiricalFisherDiagonal().fit(calibration))
    masks = {"0.weight": torch.eye(4, 5).bool(), "2.weight": torch.ones(3, 4).bool()}
    other = EmpiricalFisherDiagonal().fit(Calibration(model, [(x, y)], cross_entropy), None, masks)
    with pytest.raises(AlignmentError, match=r"0\.weight"):
        whole.merge(other)


def test_survives_saving_and_loading(tmp_path: Path) -> None:
    fisher = _fit(_model(), *_data())
    fisher.save(tmp_path / "fisher.safetensors")
    loaded = EmpiricalFisherDiagonal.load(tmp_path / "fisher.safetensors")
    torch.testing.assert_close(loaded.diagonal(), fisher.diagonal(), rtol=0, atol=0)
    assert loaded.count == fisher.count
    assert loaded.calibration is None
    loaded.check_fitted_to(fisher.masks)


def test_refuses_to_load_another_statistic(tmp_path: Path) -> None:
    class Other(EmpiricalFisherDiagonal):
        pass

    _fit(_model(), *_data()).save(tmp_path / "fisher.safetensors")
    with pytest.raises(ArgumentError, match="Expected a file of Other, got one of Empirical"):
        Other.load(tmp_path / "fisher.safetensors")


def test_refuses_gradients_that_are_not_finite() -> None:
    x, y = _data()
    x[3, 0] = float("inf")
    with pytest.raises(CalibrationError, match="finite"):
        _fit(_model(), x, y)
