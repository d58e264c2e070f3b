"""Closed forms against quadrature, against published numbers, and everywhere in their box."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.references.log_normal import QuadratureGate
from torchprune_bayes._numerics.log_normal import (
    HALF_LOG_2PI,
    TruncatedLogNormal,
    delta_f_normal,
    delta_f_uniform,
    log_interval,
)

# μ, σ: KL, E[θ], SNR, ΔF_N (σ̃p = 1e-6), ΔF_U8, ΔF_U4 (p2 = 23), by quadrature with 60 digits
GOLDEN = [
    (0, 0.0067379469991, 7.26994092, 0.994646515, 246.699206, -4405285.0, -338652.105, -84667.2828),
    (
        -0.3,
        0.0067379469991,
        6.57679374,
        0.740835037,
        148.411475,
        -4274118.09,
        -303001.735,
        -67337.9532,
    ),
    (-1, 0.05, 4.57252601, 0.368339578, 19.9875013, -72194.9214, -4136.50226, -632.484255),
    (-3, 0.5, 2.26994094, 0.0564161385, 1.87638366, -575.230005, -14.8833792, 0.025328726),
    (-8, 3, 0.497573237, 0.0111994145, 0.202550021, -7.01794796, 0.421512415, 0.375874699),
    (-12, 5, 0.15580727, 0.0082016796, 0.149105317, -0.747575306, 0.343017158, 0.1982646),
    (0, 20, 0.0103612463, 0.0582918467, 0.362893281, -0.344076166, 0.00364600776, 0.0324287977),
    (-20, 2, 1.57679374, 2.97669914e-8, 0.190401959, 2.07679374, -2.50457614, -2.74096491),
    (-20, 10, 0.127053088, 0.0139298386, 0.17876844, 0.51392374, 0.0782519677, -0.0464806445),
    (
        -0.7,
        40,
        0.000596788838,
        0.0518588722,
        0.340129019,
        -0.0795599858,
        0.00268399693,
        0.00912281455,
    ),
    (-25, 4, 1.3576147, 3.85897006e-7, 0.00507821085, 2.15687481, -1.54003479, -1.77637581),
]


def gate(mu: float, sigma: float) -> TruncatedLogNormal:
    return TruncatedLogNormal(
        torch.tensor(mu, dtype=torch.float64), torch.tensor(math.log(sigma), dtype=torch.float64)
    )


def quantities(q: TruncatedLogNormal) -> list[torch.Tensor]:
    return [
        q.kl(),
        q.mean(),
        q.snr(),
        delta_f_normal(q, sigma_p=1e-6),
        delta_f_uniform(q, p1=8, p2=23),
        delta_f_uniform(q, p1=4, p2=23),
    ]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row[0]},{row[1]:.3g}")
def test_golden_numbers(row):
    mu, sigma, *expected = row
    # σ = e⁻⁵ is printed with 11 digits in the first rows.
    q = gate(mu, math.exp(-5) if sigma < 0.01 else sigma)
    for found, value in zip(quantities(q), expected, strict=True):
        assert float(found) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize(
    ("mu", "sigma"), [(-0.1, 0.3), (-4.5, 1.2), (-11.0, 7.0), (-19.0, 0.6), (-25.0, 4.0), (0.0, 90)]
)
def test_quadrature(mu, sigma):
    q, reference = gate(mu, sigma), QuadratureGate(mu, sigma)
    expected = [
        reference.kl(),
        float(reference.moment(1)),
        reference.snr(),
        reference.delta_f_normal(),
        reference.delta_f_uniform(8),
        reference.delta_f_uniform(4),
    ]
    for found, value in zip(quantities(q), expected, strict=True):
        assert float(found) == pytest.approx(value, rel=1e-7, abs=1e-10)
    without_hole = delta_f_uniform(q, p1=8)
    assert float(without_hole) == pytest.approx(reference.delta_f_uniform(8, None), rel=1e-9)
    wide = delta_f_normal(q, mu_p=-15.0, sigma_p=0.5)
    assert float(wide) == pytest.approx(reference.delta_f_normal(0.5, -15.0), rel=1e-8)


def test_a_narrow_spike_is_the_savage_dickey_ratio():
    q = gate(-17.0, 2.0)
    assert float(delta_f_normal(q)) == pytest.approx(
        float(delta_f_normal(q, sigma_p=1e-9)), abs=1e-8
    )
    assert float(delta_f_normal(q)) == pytest.approx(
        float(q.log_density(-20.0)) - math.log(1 / 20), rel=1e-14
    )


def test_the_released_code_drops_half_log_2_pi():
    # Equation 8 as the released code has it: ½ log(σ̃q²/(σ̃p² σ²)), in a case without cancellation.
    mu, sigma, mu_p, sigma_p = -12.0, 5.0, -18.0, 2.0
    q = gate(mu, sigma)
    variance = 1 / (1 / sigma**2 + 1 / sigma_p**2)
    centre = variance * (mu / sigma**2 + mu_p / sigma_p**2)

    def mass(location: float, scale: float) -> float:
        return 0.5 * (
            math.erf(-location / scale / 2**0.5) - math.erf((-20 - location) / scale / 2**0.5)
        )

    code = (
        math.log(mass(centre, variance**0.5) * 20 / (mass(mu, sigma) * mass(mu_p, sigma_p)))
        + 0.5 * math.log(variance / (sigma**2 * sigma_p**2))
        - 0.5 * (mu**2 / sigma**2 + mu_p**2 / sigma_p**2 - centre**2 / variance)
    )
    exact = float(delta_f_normal(q, mu_p=mu_p, sigma_p=sigma_p))
    assert code == pytest.approx(exact + HALF_LOG_2PI, abs=1e-12)


def test_where_the_posterior_is_the_prior():
    q = gate(-10.0, 1e4)
    assert float(q.mean()) == pytest.approx((1 - math.exp(-20)) / 20, rel=1e-5)
    assert float(q.snr()) == pytest.approx(1 / 3, rel=1e-4)
    for found in (q.kl(), delta_f_normal(q), delta_f_uniform(q), delta_f_uniform(q, p1=4, p2=23)):
        assert float(found) == pytest.approx(0.0, abs=1e-5)


def test_the_hole_keeps_collapsed_gates_and_is_closed_by_default():
    collapsed = gate(-20.0, 2.0)
    assert float(delta_f_uniform(collapsed, p2=23)) < -1
    assert float(delta_f_uniform(collapsed)) > 0


def test_moments_of_samples():
    q = TruncatedLogNormal(torch.tensor([-3.0, -8.0]), torch.tensor([0.5, 3.0]).log())
    uniform = torch.rand(
        400_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    theta = q.sample(uniform)
    error = theta.std(0) / len(theta) ** 0.5
    assert ((theta.mean(0) - q.mean()).abs() < 4 * error).all()
    assert theta.min() >= math.exp(-20)
    assert theta.max() <= 1.0
    quarter = (theta.log() < -8.0 * math.log(2)).double().mean(0).log() + math.log(
        20 / (20 - 8 * math.log(2))
    )
    assert abs(float(quarter[1] - delta_f_uniform(q)[1])) < 0.01


def test_gradients_of_samples_are_those_of_the_quantile_function():
    uniform = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    parameters = [
        torch.tensor([-2.0, -10.0, -19.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([-0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(
        lambda mu, log_sigma: TruncatedLogNormal(mu, log_sigma).sample(uniform), parameters
    )
    assert torch.autograd.gradcheck(
        lambda mu, log_sigma: quantities(TruncatedLogNormal(mu, log_sigma))[0], parameters
    )


@given(mu=st.floats(-20, 0), log_sigma=st.floats(-20, 5), u=st.floats(0, 1))
@example(mu=0.0, log_sigma=-20.0, u=0.0)
@example(mu=-20.0, log_sigma=-20.0, u=1.0)
@example(mu=-20.0, log_sigma=5.0, u=0.5)
@example(mu=0.0, log_sigma=5.0, u=1.0)
def test_everything_is_finite_in_the_box(mu, log_sigma, u):
    draws = torch.tensor(u, dtype=torch.float64)
    for index in range(9):
        parameters = [
            torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for value in (mu, log_sigma)
        ]
        q = TruncatedLogNormal(*parameters)
        values = [*quantities(q), delta_f_normal(q), delta_f_uniform(q), q.sample(draws)]
        assert torch.isfinite(values[index])
        for gradient in torch.autograd.grad(values[index], parameters):
            assert torch.isfinite(gradient)


@given(mu=st.floats(-20, 0), log_sigma=st.floats(-20, 5))
def test_bounds_of_the_quantities(mu, log_sigma):
    q = gate(mu, math.exp(log_sigma))
    assert float(q.kl()) >= -1e-12
    assert math.exp(-20) * (1 - 1e-9) <= float(q.mean()) <= 1
    assert float(q.snr()) > 0
    # q(interval) is at most one, so ΔF_U is at most −log p(interval).
    assert float(delta_f_uniform(q)) <= -math.log((20 - 8 * math.log(2)) / 20) + 1e-12


@given(sigma=st.floats(2e-5, 5e-4), mu=st.sampled_from([0.0, -1e-4, -5.0, -20.0]))
def test_snr_has_no_seam_where_its_formula_changes(sigma, mu):
    q = gate(mu, sigma)
    # To first order θ/e^μ − 1 is the truncated normal itself, whose spread is √(1 − 2/π) of σ at
    # either bound.
    beta = (0 - mu) / sigma
    if mu in (0.0, -20.0):
        assert float(q.snr()) * sigma == pytest.approx((1 - 2 / math.pi) ** -0.5, rel=2e-3)
    elif beta > 10:
        assert float(q.snr()) * sigma == pytest.approx(1.0, rel=1e-4)


def test_intervals_in_both_tails():
    x = torch.tensor([-42.0, 40.0, -1.0], dtype=torch.float64)
    left, right, middle = log_interval(x, x + 2).tolist()
    assert left == pytest.approx(right, rel=1e-14)
    assert left == pytest.approx(-804.60844201, rel=1e-10)  # log Φ(−40)
    assert middle == pytest.approx(math.log(math.erf(1 / 2**0.5)), rel=1e-14)
