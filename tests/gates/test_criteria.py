"""The five criteria, and how margins become masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes._numerics.log_normal import HALF_LOG_2PI, TruncatedLogNormal
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.gates import (
    DEFAULT_TAU,
    BMRSNormal,
    BMRSUniform,
    Criterion,
    PosteriorMean,
    SignalToNoise,
    WeightNorm,
    choose_closed,
    find_criterion,
)

PAPER_U8, PAPER_U4 = BMRSUniform(8, p2=23, tau=0), BMRSUniform(4, p2=23, tau=0)


def margin(criterion: Criterion, mu: float, sigma: float, norm: float = 1.0) -> float:
    q = TruncatedLogNormal(torch.tensor([mu]), torch.tensor([sigma], dtype=torch.float64).log())
    return float(criterion.margin(q, lambda: torch.tensor([norm])))


# Smallest σ that prunes at a given μ: None never, 0 always; by a scan with 60-digit quadrature.
BOUNDARIES = [
    (BMRSNormal(tau=0), {0: None, -5: None, -10: None, -15: 3.9, -20: 0}),
    (BMRSNormal(), {0: 12.5, -1: 12.0, -5: 9.8, -10: 6.25, -15: 2.42, -20: 0}),
    (PAPER_U8, {0: 16.2, -1: 13.4, -5: 4.74, -10: 0, -15: 0, -20: 6.83}),
    (PAPER_U4, {0: 6.55, -1: 5.76, -5: 0, -10: 0, -20: 17.7}),
    (BMRSUniform(8, tau=0), {0: None, -5: None, -10: 0, -15: 0, -20: 0}),
    (SignalToNoise(), {0: 2.64, -1: 2.06, -5: 0.833, -10: 0.833, -15: 0.833, -20: 1.04}),
    (PosteriorMean(), {0: 7.95, -1: 7.17, -5: 0, -10: 0, -15: 0, -20: 0}),
]


@pytest.mark.parametrize(("criterion", "smallest"), BOUNDARIES, ids=lambda value: repr(value)[:40])
def test_decision_boundaries(criterion, smallest):
    for mu, sigma in smallest.items():
        if sigma is None:
            assert all(margin(criterion, mu, s) < 0 for s in (0.01, 1.0, 10.0, 148.0))
        elif sigma == 0:
            assert all(margin(criterion, mu, s) >= 0 for s in (0.01, 0.3, 1.0, 2.5, 148.0))
        else:
            assert margin(criterion, mu, sigma * 0.99) < 0 <= margin(criterion, mu, sigma * 1.01)


def test_tau_shifts_the_margin_and_its_default_is_what_the_released_code_drops():
    assert pytest.approx(0.9189385332) == DEFAULT_TAU == HALF_LOG_2PI
    for exact, shifted in ((BMRSNormal(tau=0), BMRSNormal()), (BMRSUniform(tau=0), BMRSUniform())):
        found = margin(shifted, -3.0, 5.0) - margin(exact, -3.0, 5.0)
        assert found == pytest.approx(DEFAULT_TAU)


def test_a_gate_that_is_its_prior_is_worth_nothing():
    for criterion in (BMRSNormal(tau=0), BMRSUniform(tau=0), BMRSUniform(4, p2=23, tau=0)):
        assert margin(criterion, -10.0, 1e4) == pytest.approx(0.0, abs=1e-5)
    assert margin(SignalToNoise(1 / 3), -10.0, 1e4) == pytest.approx(0.0, abs=1e-4)


def test_norms_and_means():
    assert margin(WeightNorm(0.5), 0, 1, norm=0.25) == pytest.approx(0.25)
    assert margin(PosteriorMean(), 0, 1e-3) == pytest.approx(-0.9, abs=1e-2)


def test_criteria_by_name():
    assert find_criterion("bmrs-n") == BMRSNormal()
    assert find_criterion("bmrs-u2.5") == BMRSUniform(p1=2.5)
    assert find_criterion("snr") == SignalToNoise(1.0)
    assert find_criterion(PAPER_U4) is PAPER_U4
    assert [find_criterion(n).additive for n in ("bmrs-n", "bmrs-u8", "snr", "l2", "mean")] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("name", ["bmrs", "bmrs-u", "SNR", ""])
def test_unknown_names(name):
    with pytest.raises(ArgumentError, match="Expected one of snr, l2, mean, bmrs-n"):
        find_criterion(name)


@pytest.mark.parametrize("options", [{"p1": 0}, {"p1": 8, "p2": 8}, {"p1": -1}])
def test_impossible_bits(options):
    with pytest.raises(ArgumentError, match="`p1` < `p2`"):
        BMRSUniform(**options)


def test_an_impossible_spike():
    with pytest.raises(ArgumentError, match="`sigma_p`"):
        BMRSNormal(sigma_p=-1.0)


margins = st.lists(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, math.inf]), min_size=1, max_size=5),
    min_size=1,
    max_size=3,
)


def as_tensors(values: list[list[float]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    scores = {str(i): torch.tensor(row, dtype=torch.float64) for i, row in enumerate(values)}
    return scores, {name: torch.ones(len(row), dtype=torch.bool) for name, row in scores.items()}


@given(margins)
def test_without_an_amount_the_sign_decides(values):
    scores, masks = as_tensors(values)
    closed = choose_closed(scores, masks, keep=0)
    assert all(torch.equal(closed[name], scores[name] >= 0) for name in scores)
    masks = {name: ~closed[name] for name in masks}
    again = choose_closed(scores, masks, keep=0)
    assert not any(mask.any() for mask in again.values())


@given(margins, st.floats(0, 1), st.booleans())
def test_an_amount_is_a_cap_and_beyond_it_a_target(values, amount, beyond):
    scores, masks = as_tensors(values)
    closed = choose_closed(scores, masks, amount=amount, beyond=beyond, keep=0)
    flat, chosen = torch.cat(list(scores.values())), torch.cat(list(closed.values()))
    count = round(amount * len(flat))
    expected = count if beyond else min(count, int((flat >= 0).sum()))
    assert int(chosen.sum()) == expected
    if expected and expected < len(flat):
        assert flat[chosen].min() >= flat[~chosen].max()


@given(margins, st.integers(1, 3))
def test_some_gates_stay_at_each_site(values, keep):
    scores, masks = as_tensors(values)
    closed = choose_closed(scores, masks, keep=keep)
    for name, mask in masks.items():
        left = mask & ~closed[name]
        assert int(left.sum()) >= min(keep, len(mask))
        expected = max(min(keep, len(mask)), int((scores[name] < 0).sum()))
        assert int(left.sum()) == expected


def test_closed_gates_do_not_count():
    scores = {"a": torch.tensor([5.0, 1.0, -1.0, 2.0])}
    masks = {"a": torch.tensor([False, True, True, True])}
    assert choose_closed(scores, masks, amount=1)["a"].tolist() == [False, False, False, True]
    assert choose_closed(scores, masks)["a"].tolist() == [False, True, False, True]


def test_impossible_amounts():
    scores, masks = as_tensors([[1.0, 2.0]])
    with pytest.raises(ArgumentError, match="with beyond=True"):
        choose_closed(scores, masks, beyond=True)
    with pytest.raises(ArgumentError, match="at most 2"):
        choose_closed(scores, masks, amount=3)
    with pytest.raises(ArgumentTypeError, match="`amount`"):
        choose_closed(scores, masks, amount="all")
