import pytest

from torchprune_bayes.cli._options import checked_options, options_of
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods import PaperVariant, WoodFisher, registered_methods


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
    ("name", "given", "value"),
    [
        ("steps", "3", 3),
        ("steps", 3, 3),
        ("damping", "1e-3", 1e-3),
        ("damping", "auto", "auto"),
        ("scope", "layer", "layer"),
        ("compat", "paper", "paper"),
        ("flops_target", "null", None),
        ("flops_target", None, None),
        ("update", "joint", "joint"),
        ("pattern", "2:4", "2:4"),
    ],
)
def test_values_have_the_types_of_the_signature(name, given, value):
    found = checked_options("woodtaylor", {name: given})
    assert found == {name: value}
    assert type(found[name]) is type(value)


def test_fields_of_an_option_may_be_given():
    found = checked_options("woodfisher", {"compat": {"centred": True}})
    assert WoodFisher(0.5, curvature=EmpiricalFisher(), **found).variant == PaperVariant(
        centred=True
    )


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(ArgumentError, match=r"option of magnitude \(scope.*\), got 'steps'"):
        checked_options("magnitude", {"steps": 3})
    with pytest.raises(ArgumentError, match=r"option of random \(none\), got 'scope'"):
        checked_options("random", {"scope": "layer"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "many"}, "Expected `steps` to be int, got 'many', an option of woodtaylor."),
        ({"damping": "much"}, "Expected `damping` to be float or Literal['auto'], got 'much'"),
        ({"update": "all"}, "Expected `update` to be Literal['none', 'single', 'joint'], got"),
    ],
)
def test_a_value_of_another_type_is_one_sentence(options, message):
    with pytest.raises(ArgumentError) as caught:
        checked_options("woodtaylor", options)
    assert str(caught.value).startswith(message)
