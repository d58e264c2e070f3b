from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes._numerics.kronecker_posterior import KroneckerBlock
from torchprune_bayes._numerics.laplace_blocks import DiagonalBlock, LaplaceBlock
from torchprune_bayes._numerics.marginal_likelihood import (
    EvidenceTerm,
    fixed_point_noise,
    gaussian_log_likelihood,
    log_marginal_likelihood,
)
from torchprune_bayes._numerics.prior_updates import matrix_precision

SHAPE = (3, 2, 2)


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _term(generator: torch.Generator, kind: str) -> EvidenceTerm:
    roots = _random(generator, 3, 5), _random(generator, 4, 5)
    block: LaplaceBlock = KroneckerBlock(*(root @ root.mT for root in roots))
    if kind == "diagonal":
        block = DiagonalBlock(block.diagonal())
    return EvidenceTerm(block, _random(generator, 3, 4))


FACTORS = {
    "layerwise": [(1, 1, 1)],
    "unitwise": [(3, 1, 1), (1, 2, 1)],
    "diag": [(3, 2, 2)],
}


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
@pytest.mark.parametrize("structure", FACTORS)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.95))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_evidence_is_concave_in_the_log_precisions(
    kind: str, structure: str, seed: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    term = _term(generator, kind)
    ends = [[2 * _random(generator, *s) for s in FACTORS[structure]] for _ in range(2)]
    middle = [share * a + (1 - share) * b for a, b in zip(*ends, strict=True)]
    first, second, between = (
        float(term.occam(matrix_precision([log.exp() for log in logs], SHAPE), 0.8))
        for logs in (*ends, middle)
    )
    assert between >= share * first + (1 - share) * second - 1e-9 * abs(first + second)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
@pytest.mark.parametrize("structure", FACTORS)
def test_half_the_difference_of_the_parts_is_the_slope(kind: str, structure: str) -> None:
    generator = torch.Generator().manual_seed(1)
    term = _term(generator, kind)
    logs = [_random(generator, *shape) for shape in FACTORS[structure]]

    def occam(shift: float) -> float:
        moved = [logs[0] + shift, *logs[1:]]  # one shift of the first factor moves every entry
        return float(term.occam(matrix_precision([log.exp() for log in moved], SHAPE), 0.8))

    precision = matrix_precision([log.exp() for log in logs], SHAPE)
    effective, scatter = term.parts_of_slope(precision, 0.8)
    slope = (occam(1e-5) - occam(-1e-5)) / 2e-5
    assert float((effective - scatter).sum()) / 2 == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_sums_the_terms() -> None:
    generator = torch.Generator().manual_seed(2)
    term = _term(generator, "diagonal")
    precision = matrix_precision([torch.ones(1, 1, 1)], SHAPE)
    one = log_marginal_likelihood(-3.0, [(term, precision)], 1.0)
    two = log_marginal_likelihood(-3.0, [(term, precision)] * 2, 1.0)
    assert two - one == pytest.approx(one + 3.0)


def test_gaussian_likelihood_is_that_of_the_normal_distribution() -> None:
    residuals = torch.tensor([0.3, -1.2, 0.5, 2.0], dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 0.7).log_prob(residuals).sum()
    found = gaussian_log_likelihood(float(residuals.square().sum()), 4, noise=0.7)
    assert found == pytest.approx(float(expected))
    # The temperature divides the fit; the normaliser is the noise's own.
    colder = gaussian_log_likelihood(float(residuals.square().sum()), 4, 0.7, temperature=0.5)
    assert colder - found == pytest.approx(-float(residuals.square().sum()) / (2 * 0.49))


def test_the_noise_is_where_the_evidence_is_stationary() -> None:
    generator = torch.Generator().manual_seed(3)
    term = _term(generator, "kronecker")
    precision = matrix_precision([torch.full((1, 1, 1), 2.0)], SHAPE)
    error, count, noise = 40.0, 60, 1.0
    for _ in range(200):
        effective = float(term.block.effective_parameters(precision, 1 / noise**2).sum())
        noise = fixed_point_noise(error, count, effective)

    def evidence(log_noise: float) -> float:
        value = math.exp(log_noise)
        fit = gaussian_log_likelihood(error, count, value)
        return log_marginal_likelihood(fit, [(term, precision)], 1 / value**2)

    slope = (evidence(math.log(noise) + 1e-5) - evidence(math.log(noise) - 1e-5)) / 2e-5
    assert slope == pytest.approx(0.0, abs=1e-5)


def test_more_parameters_than_observations_leave_a_noise() -> None:
    assert 0 < fixed_point_noise(4.0, observations=10, effective=50.0) < 10
