"""Least squares on inputs that hardly vary around a large mean."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes._numerics.input_moments import Moments, Refits, least_squares


@given(st.integers(0, 2**31), st.floats(-14.0, 0.0), st.floats(-3.0, 3.0))
def test_a_fit_is_finite_and_no_worse_than_the_cut_however_little_inputs_vary(
    seed: int, spread: float, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = 10.0**size * torch.randn(6, generator=generator, dtype=torch.float64)
    noise = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    x = mean * (1.0 + 10.0**spread * noise)
    halves = Moments.zeros(6, x.device), Moments.zeros(6, x.device)
    halves[0].add(x[::2])
    halves[1].add(x[1::2])
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    keep = torch.tensor([True, True, False, True, False, True])
    fit = least_squares(weight, keep, halves, intercept=True, damping=1e-3)
    assert fit.weight.isfinite().all()
    assert fit.error <= fit.cut_error * (1.0 + 1e-6)
    wanted, found = weight @ mean, fit.weight @ mean + fit.shift
    torch.testing.assert_close(
        found, wanted, rtol=0.0, atol=float(10 ** (size + spread + 1) + 1e-6)
    )


@given(st.integers(0, 2**31), st.integers(2, 40), st.booleans())
def test_the_damping_is_the_one_that_predicts_the_other_half_best(
    seed: int, count: int, intercept: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 7, generator=generator, dtype=torch.float64) + 1.0
    x[:, 5:] = x[:, :2] + 0.3 * x[:, 5:]
    weight = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    keep = torch.tensor([True, True, False, True, False, True, False])
    halves = Moments.zeros(7, x.device), Moments.zeros(7, x.device)
    for half, moments in enumerate(halves):
        moments.add(x[half::2])
    chosen = least_squares(weight, keep, halves, intercept=intercept).damping

    def error(damping: float) -> float:
        total = 0.0
        for fitted, unseen in (halves, halves[::-1]):
            alone = (fitted, Moments.zeros(7, x.device))
            fit = least_squares(weight, keep, alone, intercept=intercept, damping=damping)
            change = weight - fit.weight
            second = unseen.second(centred=intercept)
            total += float(((change @ second) * change).sum())
        return total

    best = min(map(error, (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)))
    assert error(chosen) <= best * (1 + 1e-9) + 1e-9


@given(
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([1e-6, 1e-3, 1e-1]),
)
def test_fits_that_share_their_products_are_those_of_a_dense_solve(
    seed: int, count: int, inputs: int, intercept: bool, damping: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64) + 1.0
    x[:, seed % inputs] = 0.0  # an input that never varies
    weight = torch.randn(4, inputs, generator=generator, dtype=torch.float64)
    keep = torch.rand(inputs, generator=generator) < 0.6
    moments = Moments.zeros(inputs, x.device)
    moments.add(x)
    mean = moments.mean() if intercept else None
    fits = Refits(weight, mean, moments.second(centred=intercept))
    found = fits.without(keep, damping)
    both = (moments, Moments.zeros(inputs, x.device))
    slow = least_squares(weight, keep, both, intercept=intercept, damping=damping)
    torch.testing.assert_close(found.weight, slow.weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.shift, slow.shift, rtol=1e-6, atol=1e-8)
    for matrix, second in [(found.weight, found.second), (weight, fits.mean_squares())]:
        outputs = x @ matrix.T
        outputs = outputs - outputs.mean(0) if intercept else outputs
        torch.testing.assert_close(second, outputs.square().mean(0), rtol=1e-6, atol=1e-8)


def test_products_are_those_of_all_pairs() -> None:
    x = torch.randn(7, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments.zeros(600, x.device)
    moments.add(x[:3])
    moments.add(x[3:])
    torch.testing.assert_close(moments.products, x.T @ x)


def test_entries_that_were_never_seen_take_part_as_zeros() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entries = torch.tensor([True, False, True, True, False, True])
    wide = x.new_zeros(5, 6)
    wide[:, entries] = x
    expected, narrow = Moments.zeros(6, x.device), Moments.zeros(4, x.device)
    expected.add(wide)
    narrow.add(x)
    found = narrow.among(entries)
    assert found.count == expected.count
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.products, expected.products)
    back = found.of(entries)
    assert torch.equal(back.products, narrow.products)
