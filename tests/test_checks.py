import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes import _checks as checks
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError


@pytest.mark.parametrize("amount", [0, 3, 0.0, 0.5, 1.0, np.float32(0.5), np.int64(2)])
def test_fractions_and_counts_are_amounts(amount: Any) -> None:
    checks.check_amount(amount)


@pytest.mark.parametrize("amount", [True, "0.5", None, torch.tensor(0.5), [0.5], 1j])
def test_what_is_no_number_is_no_amount(amount: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"Expected `amount` to be a float .* of type"):
        checks.check_amount(amount)


@pytest.mark.parametrize("amount", [-1, -0.1, 1.5, math.nan, math.inf])
def test_impossible_amounts_are_refused(amount: float) -> None:
    with pytest.raises(ArgumentError, match=f"got {amount}"):
        checks.check_amount(amount)


@given(st.floats(0, 1), st.integers(0, 10**9))
def test_a_fraction_is_rounded_as_the_host_does(amount: float, remaining: int) -> None:
    assert checks.count_to_prune(amount, remaining) == round(amount * remaining)


def test_a_count_is_taken_as_it_is_up_to_what_is_left() -> None:
    assert checks.count_to_prune(1, 10) == 1
    assert checks.count_to_prune(1.0, 10) == 10
    assert checks.count_to_prune(np.int64(10), 10) == 10
    with pytest.raises(ArgumentError, match="at most 10, the number of entries left, got 11"):
        checks.count_to_prune(11, 10)


def test_fractions_are_checked_at_both_ends() -> None:
    for value in (0, 0.5, 1):
        checks.check_fraction("share", value)
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match=r"`share` in \[0, 1\], got"):
            checks.check_fraction("share", value)
    with pytest.raises(ArgumentError, match=r"`share` in \[0, 1\), got 1"):
        checks.check_fraction("share", 1, closed=False)


@pytest.mark.parametrize("check", [checks.check_fraction, checks.check_positive])
@pytest.mark.parametrize("value", [True, "1", None, torch.tensor(0.5)])
def test_what_is_no_number_is_refused(check: Any, value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="Expected `x` to be a number"):
        check("x", value)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_numbers_that_are_not_positive_are_refused(value: float) -> None:
    with pytest.raises(ArgumentError, match="Expected `x` to be positive and finite"):
        checks.check_positive("x", value)
    checks.check_positive("x", 1e-30)


def test_counts_are_integers_from_a_minimum_on() -> None:
    checks.check_count("n", np.int32(1))
    checks.check_count("n", 0, minimum=0)
    with pytest.raises(ArgumentError, match="Expected `n` of at least 1, got 0"):
        checks.check_count("n", 0)
    for value in (1.0, True, "1"):
        with pytest.raises(ArgumentTypeError, match="Expected `n` to be an int"):
            checks.check_count("n", value)


def test_choices_are_listed() -> None:
    checks.check_choice("path", "cubic", ("cubic", None))
    with pytest.raises(ArgumentError, match="`path` to be one of 'cubic', None, got 'square'"):
        checks.check_choice("path", "square", ("cubic", None))


def test_entries_that_are_not_finite_are_counted() -> None:
    checks.check_finite("x", torch.ones(3))
    with pytest.raises(ArgumentError, match="got 2 NaN or infinite of 3 entries"):
        checks.check_finite("x", torch.tensor([1.0, math.nan, -math.inf]))
