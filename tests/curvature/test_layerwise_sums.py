from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.integrations.processes import in_two_processes
from torchprune_bayes import Calibration
from torchprune_bayes.curvature import EmpiricalFisher, LayerCurvature
from torchprune_bayes.errors import AlignmentError, ArgumentError, CalibrationError


def _model() -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double()


def _data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    return [(x[:4], torch.arange(4) % 3), (x[4:], torch.arange(5) % 3)]


def _fit(data: Any, **options: Any) -> LayerCurvature:
    return LayerCurvature(**{"structure": "both", **options}).fit_model(
        _model(), data, cross_entropy
    )


def _assert_equal(found: LayerCurvature, expected: LayerCurvature) -> None:
    assert found.count == expected.count
    assert found.sums.keys() == expected.sums.keys()
    for key, value in expected.sums.items():
        torch.testing.assert_close(found.sums[key], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["empirical", "ggn"])
def test_merged_parts_are_the_whole(kind: Any) -> None:
    first, second = _data()
    merged = _fit([first], kind=kind).merge(_fit([second], kind=kind))
    whole = _fit([first, second], kind=kind)
    _assert_equal(merged, whole)
    for name in whole.kronecker_names:
        for ours, expected in zip(merged.factors(name), whole.factors(name), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
    assert merged.loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)


def test_other_kinds_and_other_masks_are_not_merged() -> None:
    with pytest.raises(AlignmentError, match="Expected curvatures of one kind"):
        _fit(_data()).merge(_fit(_data(), kind="ggn"))
    with pytest.raises(AlignmentError, match="Expected curvatures of one kind"):
        _fit(_data()).merge(_fit(_data(), structure="diagonal"))
    fits = []
    for amount in (3, 4):
        pruned = _model()
        prune.l1_unstructured(pruned[0], "weight", amount)
        fits.append(LayerCurvature().fit_model(pruned, _data(), cross_entropy))
    with pytest.raises(AlignmentError, match="fit it again"):
        fits[0].merge(fits[1])


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "both"])
def test_saved_and_loaded_is_the_same(structure: Any, tmp_path: Path) -> None:
    found = _fit(_data(), structure=structure, kind="ggn")
    found.save(tmp_path / "curvature.safetensors")
    loaded = LayerCurvature.load(tmp_path / "curvature.safetensors")
    _assert_equal(loaded, found)
    assert loaded.kind == "ggn"
    assert loaded.kronecker_names == found.kronecker_names
    assert (loaded.loss_sum, loaded.num_terms) == (found.loss_sum, found.num_terms)
    assert loaded.calibration is None
    _assert_equal(loaded.merge(_fit(_data(), structure=structure, kind="ggn")), found.merge(found))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    calibration = Calibration(_model(), _data(), cross_entropy)
    EmpiricalFisher().fit(calibration).save(tmp_path / "fisher.safetensors")
    with pytest.raises(ArgumentError, match="Expected a file of LayerCurvature, got one of"):
        LayerCurvature.load(tmp_path / "fisher.safetensors")
    (tmp_path / "damaged").write_bytes(b"no such format")
    with pytest.raises(ArgumentError, match="damaged"):
        LayerCurvature.load(tmp_path / "damaged")
    with pytest.raises(ArgumentError, match="no such file"):
        LayerCurvature.load(tmp_path / "none")


def test_saved_from_channels_last_and_loaded_to_a_device(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    model = model.to(memory_format=torch.channels_last)
    data = [(torch.randn(4, 3, 4, 4), torch.arange(4) % 3)]
    found = LayerCurvature(structure="both").fit_model(model, data, cross_entropy)
    found.save(tmp_path / "curvature.safetensors")
    loaded = LayerCurvature.load(tmp_path / "curvature.safetensors", device="cpu")
    _assert_equal(loaded, found)
    on_meta = LayerCurvature.load(tmp_path / "curvature.safetensors", device="meta")
    tensors = [*on_meta.masks.values(), *on_meta.sums.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def _on_rank(folder: str) -> None:
    rank = distributed.get_rank()
    _fit([_data()[rank]]).all_reduce().save(Path(folder) / f"{rank}.safetensors")


def test_two_processes_are_as_one(tmp_path: Path) -> None:
    in_two_processes(_on_rank, str(tmp_path))
    whole = _fit(_data())
    for rank in range(2):
        _assert_equal(LayerCurvature.load(tmp_path / f"{rank}.safetensors"), whole)


def _state(model: nn.Module) -> Any:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return copy.deepcopy(
        (
            {name: value.clone() for name, value in model.state_dict().items()},
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [module.training for module in model.modules()],
            hooks,
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state(),
            torch.is_grad_enabled(),
        )
    )


def _assert_same_state(before: Any, after: Any) -> None:
    assert str(before) == str(after)
    for name, value in before[0].items():
        assert torch.equal(after[0][name], value)
    assert torch.equal(before[4], after[4])


@pytest.mark.parametrize("kind", ["empirical", "monte_carlo", "ggn"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_changes(kind: Any, fails: bool) -> None:
    model, data = _model(), _data()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].bias.requires_grad_(False)
    if fails:
        data[1][0][0] = torch.nan
    parameters = list(model.parameters())
    before = _state(model)
    with torch.no_grad():
        before_grad = _state(model)[-1]
        curvature = LayerCurvature(kind, "both")
        if fails:
            with pytest.raises(CalibrationError, match="Expected a finite curvature"):
                curvature.fit_model(model, data, cross_entropy)
            assert not hasattr(curvature, "sums")
        else:
            curvature.fit_model(model, data, cross_entropy)
        assert torch.is_grad_enabled() == before_grad
    _assert_same_state(before, _state(model))
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))


def test_a_failed_fit_keeps_what_was_fitted_before() -> None:
    model, data = _model(), _data()
    curvature = LayerCurvature().fit_model(model, data, cross_entropy)
    before = {key: value.clone() for key, value in curvature.sums.items()}
    data[1][0][0] = torch.nan
    with pytest.raises(CalibrationError, match="Expected a finite curvature"):
        curvature.fit_model(model, data, cross_entropy)
    assert curvature.count == 9
    assert all(torch.equal(curvature.sums[key], value) for key, value in before.items())


def test_dropout_and_batch_statistics_are_those_of_eval_mode() -> None:
    model = _model().train()
    in_training = LayerCurvature().fit_model(model, _data(), cross_entropy)
    _assert_equal(LayerCurvature().fit_model(model.eval(), _data(), cross_entropy), in_training)


def test_samples_are_limited_and_their_drawing_is_seeded() -> None:
    found = LayerCurvature().fit_model(_model(), _data(), cross_entropy, num_samples=6)
    (first, second) = _data()
    expected = _fit([first, (second[0][:2], second[1][:2])], structure="diagonal")
    _assert_equal(found, expected)
