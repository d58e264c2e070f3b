"""``curvature=`` is a fitted object in every method, and ``structure=`` a word."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import (
    Calibration,
    EmpiricalFisher,
    LayerCurvature,
    prunable_parameters,
    prune_global,
    registered_methods,
)
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError

HOLDERS = [
    name
    for name, entry in registered_methods().items()
    if "curvature" in inspect.signature(entry.method).parameters
]
# How the curvature is fitted that a method takes; the others take an EmpiricalFisher.
FITTED: dict[str, dict[str, Any]] = {
    "kfac": {"structure": "kronecker"},
    "diagonal-fisher": {},
    "opd": {"kind": "ggn"},
    "laplace-evidence": {"kind": "ggn", "structure": "kronecker"},
}


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def _calibration(model: nn.Module) -> Calibration:
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    return Calibration(model, [(x, torch.arange(24) % 3)], cross_entropy)


@pytest.mark.parametrize("name", HOLDERS)
def test_a_word_or_another_statistic_is_refused_in_a_sentence(name: str) -> None:
    calibration = _calibration(_model())
    other: Any = EmpiricalFisher() if name in FITTED else LayerCurvature()
    for wrong, hint in ((other.fit(calibration), "fitted"), ("kron", "`structure` says")):
        with pytest.raises(ArgumentTypeError, match=f"Expected `curvature` of .*{hint}"):
            prune_global(None, name, amount=0.5, calibration=calibration, curvature=wrong)


@pytest.mark.parametrize("name", FITTED)
def test_a_saved_curvature_takes_the_place_of_the_data(name: str, tmp_path: Path) -> None:
    model = _model()
    fitted = LayerCurvature(**FITTED[name]).fit(_calibration(model))
    fitted.save(tmp_path / "curvature.safetensors")
    options: dict[str, Any] = {"amount": 0.5} | ({"damping": 0.01} if name == "kfac" else {})
    expected = prune_global(None, name, curvature=fitted, **options)

    twin = _model()
    loaded = LayerCurvature.load(tmp_path / "curvature.safetensors", device="cpu")
    found = prune_global(prunable_parameters(twin), name, curvature=loaded, **options)
    torch.testing.assert_close(found.masks, expected.masks)
    torch.testing.assert_close(found.updates, expected.updates)
    assert sum(int(mask.sum()) for mask in found.masks.values()) == 24
    with pytest.raises(AlignmentError, match="fit it again"):
        prune_global(prunable_parameters(twin), name, curvature=loaded, **options)

    one = _model()
    with pytest.raises(AlignmentError):  # no model is known, and so no name
        registered_methods()[name].method.apply(one[0], "weight", curvature=loaded, **options)
    loaded.calibration = _calibration(one)
    hook = registered_methods()[name].method.apply(one[0], "weight", curvature=loaded, **options)
    assert int(one[0].weight_mask.sum()) == 15
    assert vars(hook)["curvature"] is None


@pytest.mark.parametrize("name", FITTED)
def test_without_data_pairs_are_needed(name: str) -> None:
    fitted = LayerCurvature(**FITTED[name]).fit(_calibration(_model()))
    fitted.calibration = None
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, name, amount=0.5, curvature=fitted)


def test_what_a_curvature_lacks_is_said() -> None:
    calibration = _calibration(_model())
    kronecker = LayerCurvature(structure="kronecker").fit(calibration)
    with pytest.raises(ArgumentError, match="structure='both'"):
        prune_global(None, "diagonal-fisher", amount=0.5, curvature=kronecker)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
@pytest.mark.parametrize("name", ["opd", "laplace-evidence"])
def test_posteriors_of_a_curvature_are_those_that_are_fitted(name: str, structure: Any) -> None:
    calibration = _calibration(_model())
    options: dict[str, Any] = {"kind": "ggn", "structure": structure}
    method: Any = registered_methods()[name].method
    fitted = LayerCurvature(**options).fit(calibration)
    ours = method(0.5, curvature=fitted, num_data=500)
    theirs = method(0.5, calibration=calibration, num_data=500, **options)
    found, expected = (one.decide(calibration.space) for one in (ours, theirs))
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.info == pytest.approx(expected.info)
