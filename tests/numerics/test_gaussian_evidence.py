"""The Savage-Dickey ratio against integrals and against exact evidences."""

from __future__ import annotations

import mpmath as mp  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes._numerics.gaussian_evidence import delta_f_gaussian


def change(mean: float, variance: float, precision: float) -> float:
    found = delta_f_gaussian(
        *(torch.tensor(x, dtype=torch.float64) for x in (mean, variance, precision))
    )
    return float(found)


@pytest.mark.parametrize(
    ("mean", "variance", "precision"), [(0.0, 0.1, 1.0), (1.5, 0.2, 0.5), (-0.3, 2.0, 0.4)]
)
def test_quadrature(mean, variance, precision):
    def normal(value, centre, spread):
        return mp.exp(-((value - centre) ** 2) / (2 * spread)) / mp.sqrt(2 * mp.pi * spread)

    mp.mp.dps = 30
    narrow = mp.mpf(10) ** -12  # variance of the reduced prior

    def integrand(value):  # q p̃ / p
        reduced = normal(value, 0, narrow) / normal(value, 0, mp.mpf(1) / precision)
        return normal(value, mean, mp.mpf(variance)) * reduced

    width = mp.sqrt(narrow)
    expected = mp.log(mp.quad(integrand, [k * width for k in range(-12, 13, 2)]))
    assert change(mean, variance, precision) == pytest.approx(float(expected), rel=1e-8, abs=1e-9)


def test_the_evidence_of_linear_regression():
    # y = X w + ε with orthogonal columns: the posterior is independent, the evidence known.
    generator = torch.Generator().manual_seed(0)
    x, _ = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64, generator=generator))
    y = x @ torch.tensor([2.0, 0.0, 0.3], dtype=torch.float64)
    y += 0.5 * torch.randn(12, dtype=torch.float64, generator=generator)
    noise, precision = 0.25, 0.8

    def log_evidence(columns: list[int]) -> float:
        part = x[:, columns]
        covariance = part @ part.T / precision + noise * torch.eye(12, dtype=torch.float64)
        return float(
            torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
        )

    variance = torch.full((3,), 1 / (1 / noise + precision), dtype=torch.float64)
    found = delta_f_gaussian(
        variance * (x.T @ y) / noise, variance, torch.tensor(precision, dtype=torch.float64)
    )
    for column in range(3):
        others = [other for other in range(3) if other != column]
        expected = log_evidence(others) - log_evidence([0, 1, 2])
        assert float(found[column]) == pytest.approx(expected, rel=1e-9)
    pair = log_evidence([2]) - log_evidence([0, 1, 2])
    assert float(found[:2].sum()) == pytest.approx(pair, rel=1e-9)


@given(st.floats(-3, 3), st.floats(0.01, 1.0), st.floats(0.1, 10.0))
def test_the_occam_term_is_what_zero_mean_leaves(mean, share, precision):
    variance = share / precision  # the data only narrow the prior
    assert change(0.0, variance, precision) >= -1e-12
    assert change(mean, variance, precision) <= change(0.0, variance, precision)
    assert change(0.0, 1 / precision, precision) == pytest.approx(0.0, abs=1e-12)


def test_weights_that_are_held_fixed_stay():
    found = delta_f_gaussian(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor(1.0))
    assert found.tolist() == [float("-inf")]
