import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes.cli._options import amount, options_of, parsed_options
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods import registered_methods


class Base:
    def __init__(self, amount, *, first=1, second=2):
        pass


class Passing(Base):
    def __init__(self, amount, *, first=10, third=3, **options):
        super().__init__(amount, **options)


class Inheriting(Passing):
    pass


class Closed(Passing):
    def __init__(self, amount, *, fourth=4):
        super().__init__(amount)


@pytest.mark.parametrize("kind", [Passing, Inheriting])
def test_options_that_are_passed_on_are_found_and_the_outer_default_counts(kind):
    assert options_of(kind) == {"first": 10, "third": 3, "second": 2}


def test_options_that_are_not_passed_on_are_not_found():
    assert options_of(Closed) == {"fourth": 4}


class Fixing(Base):
    def __init__(self, amount, **options):
        super().__init__(amount, first=5, **options)


def test_an_option_that_a_subclass_fixes_is_not_found():
    assert options_of(Fixing) == {"second": 2}


def test_every_registered_method_takes_the_options_found():
    for entry in registered_methods().values():
        entry.method(0.5, **options_of(entry.method))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("steps=3", 3),
        ("damping=1e-3", 1e-3),
        ("damping=auto", "auto"),
        ("centred=True", True),
        ("flops_target=None", None),
        ("update='joint'", "joint"),
        ("path=a=b", "a=b"),
    ],
)
def test_values_are_literals_or_else_words(text, value):
    (found,) = parsed_options("woodtaylor", [text]).values()
    assert found == value
    assert type(found) is type(value)


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(ArgumentError, match=r"option of magnitude \(scope.*\), got 'steps'"):
        parsed_options("magnitude", ["steps=3"])
    with pytest.raises(ArgumentError, match=r"option of random \(none\), got 'scope'"):
        parsed_options("random", ["scope=layer"])


def test_an_option_needs_a_value():
    with pytest.raises(ArgumentError, match="key=value, got 'steps'"):
        parsed_options("woodtaylor", ["steps"])


@given(st.integers(0, 10**9))
def test_whole_numbers_are_counts(count):
    assert amount(str(count)) == count
    assert type(amount(str(count))) is int


@given(st.floats(0, 1))
def test_other_numbers_are_fractions(fraction):
    assert amount(repr(fraction)) == fraction
    assert type(amount(repr(fraction))) is float
