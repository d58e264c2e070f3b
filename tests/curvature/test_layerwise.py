from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from tests.references.layer_curvature import empirical_diagonal, ggn, split
from torchprune_bayes import Calibration
from torchprune_bayes.curvature import LayerCurvature, trainable_parameters
from torchprune_bayes.errors import ArgumentError, CalibrationError, ParameterError
from torchprune_bayes.seeds import derived_seed


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _mlp(outputs: int = 3) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def _convnet() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def _labels(samples: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(1))


def _mean_of_sums(f: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (f - y).square().sum(1).mean()


CASES: dict[str, tuple[Any, Tensor, Tensor, Any]] = {
    "cross-entropy": (_mlp, _normal(8, 4), _labels(8), cross_entropy),
    "convolution": (_convnet, _normal(8, 1, 4, 4), _labels(8), cross_entropy),
    "mse": (_mlp, _normal(8, 4), _normal(8, 3), mse_loss),
    "gaussian": (_mlp, _normal(8, 4), _normal(8, 3), _mean_of_sums),
    "binary": (
        _mlp,
        _normal(8, 4),
        (_normal(8, 3) > 0).double(),
        binary_cross_entropy_with_logits,
    ),
}


def _curvature(case: str, kind: Any, **options: Any) -> tuple[LayerCurvature, nn.Module]:
    make, x, y, loss_fn = CASES[case]
    model = make()
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    return LayerCurvature(kind, **options).fit_model(model, data, loss_fn), model


@pytest.mark.parametrize("case", CASES)
def test_empirical_diagonal_of_any_mean_loss(case: str) -> None:
    found, model = _curvature(case, "empirical")
    _, x, y, loss_fn = CASES[case]
    expected = empirical_diagonal(model, [(x, y)], loss_fn, trainable_parameters(model))
    for name, value in found.diagonal().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-15)
    assert found.count == 8
    assert found.num_terms == 8
    assert found.loss_sum == pytest.approx(8 * loss_fn(model(x), y).item(), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_ggn_diagonal_is_that_of_the_dense_matrix(case: str) -> None:
    found, model = _curvature(case, "ggn")
    _, x, y, loss_fn = CASES[case]
    expected = split(ggn(model, x, y, loss_fn).diagonal(), model)
    for name, value in found.diagonal().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_monte_carlo_converges_to_the_ggn(case: str) -> None:
    draws = 400
    found, _ = _curvature(case, "monte_carlo", draws=draws)
    expected, _ = _curvature(case, "ggn")
    exact = expected.diagonal()
    errors = [found.diagonal()[name] - value for name, value in exact.items()]
    size = sum(float(value.square().sum()) for value in exact.values())
    error = sum(float(e.square().sum()) for e in errors)
    # 8 samples of 400 draws each; single draws have relative deviations of a few.
    assert (error / size) ** 0.5 < 5 / (8 * draws) ** 0.5


def test_monte_carlo_is_the_empirical_fisher_of_the_drawn_labels() -> None:
    found, model = _curvature("cross-entropy", "monte_carlo")
    _, x, _, _ = CASES["cross-entropy"]
    generator = torch.Generator().manual_seed(derived_seed(0, "curvature", 0))
    with torch.no_grad():
        below = model(x).softmax(1).cumsum(1)
    uniform = torch.cat([torch.rand(n, generator=generator, dtype=torch.float32) for n in (5, 3)])
    drawn = (below < uniform.double().unsqueeze(1)).sum(1)
    expected = empirical_diagonal(model, [(x, drawn)], cross_entropy, trainable_parameters(model))
    for name, value in found.diagonal().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-15)


def test_true_fisher_of_a_calibration_is_the_one_with_its_drawn_labels() -> None:
    model, x, y = _mlp(), _normal(8, 4), _labels(8)
    calibration = Calibration(model, [(x, y)], cross_entropy, fisher="true")
    (batch,) = calibration.fisher_batches()
    found = LayerCurvature().fit(calibration)
    expected = empirical_diagonal(model, [batch], cross_entropy, calibration.pairs())
    for name, value in found.diagonal().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-15)


def test_labels_that_are_ignored_count_for_nothing() -> None:
    model, x, y = _mlp(), _normal(8, 4), _labels(8)
    some = y.clone()
    some[[1, 6, 7]] = -100
    kept = some >= 0
    for kind in ("empirical", "ggn"):
        found = LayerCurvature(kind).fit_model(model, [(x, some)], cross_entropy)
        expected = LayerCurvature(kind).fit_model(model, [(x[kept], y[kept])], cross_entropy)
        for name, value in expected.diagonal().items():
            torch.testing.assert_close(found.diagonal()[name] * 8, value * 5, rtol=1e-10, atol=0)
        assert (found.count, found.num_terms) == (8, 5)
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-12)


def test_any_other_ignored_label_can_be_named() -> None:
    model, x, y = _mlp(), _normal(8, 4), _labels(8)

    def loss_fn(f: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(f, y, ignore_index=2)

    kept = y != 2
    assert not kept.all()
    found = LayerCurvature(ignore_index=2).fit_model(model, [(x, y)], loss_fn)
    expected = LayerCurvature().fit_model(model, [(x[kept], y[kept])], cross_entropy)
    for name, value in expected.diagonal().items():
        torch.testing.assert_close(
            found.diagonal()[name] * 8, value * int(kept.sum()), rtol=1e-10, atol=0
        )
    assert set(found.coverage.values()) == {"Linear"}


def test_weights_and_masks_given_are_the_ones_used() -> None:
    model, x, y = _mlp(), _normal(8, 4), _labels(8)
    calibration = Calibration(model, [(x, y)], cross_entropy)
    weights = {"0.weight": torch.full((5, 4), 0.3, dtype=torch.float64)}
    masks = {"0.weight": torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) > 0.5}
    found = LayerCurvature().fit(calibration, weights, masks)
    twin = _mlp()
    with torch.no_grad():
        twin[0].weight.fill_(0.3)
    expected = LayerCurvature().fit_model(twin, [(x, y)], cross_entropy)
    assert list(found.diagonal()) == ["0.weight"]
    torch.testing.assert_close(
        found.diagonal()["0.weight"], expected.diagonal()["0.weight"] * masks["0.weight"]
    )


@pytest.mark.parametrize("kind", ["ggn", "monte_carlo"])
def test_second_derivatives_need_outputs_per_sample(kind: Any) -> None:
    model = nn.Linear(4, 3).double()
    with pytest.raises(CalibrationError, match=r"Expected outputs \[B, C\]"):
        LayerCurvature(kind).fit_model(model, [(_normal(2, 6, 4), _normal(2, 6, 3))], mse_loss)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model, x, y = _mlp(), _normal(8, 4), _labels(8)
    x[3, 2] = torch.nan
    with pytest.raises(CalibrationError, match="Expected a finite curvature"):
        LayerCurvature().fit_model(model, [(x, y)], cross_entropy)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "hessian"},
        {"structure": "full"},
        {"token_loss": "max"},
        {"draws": 0},
        {"batch_size": 0},
        {"factor_limit": 0},
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="Expected"):
        LayerCurvature(**wrong)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ParameterError, match="Expected trainable parameters in Linear, got none"):
        trainable_parameters(nn.Linear(2, 2).requires_grad_(False))
