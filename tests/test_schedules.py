"""Schedules: closed forms, exact ends, and laws that hold for all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.schedules import (
    Schedule,
    amount_between,
    constant,
    cubic,
    geometric,
    halving,
    linear,
    one_shot,
    polynomial,
    sparsity_path,
)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from(["constant", "polynomial", "geometric", "halving"]))
    initial, final = sorted(
        draw(st.tuples(*[st.floats(0, 1, exclude_max=kind == "geometric")] * 2))
    )
    begin = draw(st.integers(0, 20))
    end = begin + draw(st.integers(0, 60))
    degree = draw(st.floats(0.1, 8))
    return Schedule(kind, final, begin, end, draw(st.integers(1, 25)), initial, degree)


@given(schedules())
def test_sparsity_never_falls_and_stays_between_initial_and_final(schedule: Schedule) -> None:
    assert schedule.end is not None
    path = [schedule(step) for step in range(schedule.end + 5)]
    assert path == sorted(path)
    assert all(schedule.initial <= sparsity <= schedule.final for sparsity in path)


@given(schedules())
def test_final_is_met_exactly_at_a_due_end(schedule: Schedule) -> None:
    assert schedule.end is not None
    assert schedule.is_due(schedule.end)
    assert schedule(schedule.end) == schedule(schedule.end + 1) == schedule.final


@given(schedules())
def test_steps_are_those_that_are_due(schedule: Schedule) -> None:
    assert schedule.end is not None
    due = [step for step in range(schedule.end + 30) if schedule.is_due(step)]
    assert list(schedule.steps()) == due
    assert due[0] == schedule.begin
    assert all(b - a == schedule.every for a, b in pairwise(due[:-1]))


@given(schedules())
def test_state_survives_json(schedule: Schedule) -> None:
    state = json.loads(json.dumps(schedule.state_dict()))
    assert Schedule.from_state_dict(state) == schedule


@given(st.floats(0, 0.99), st.floats(0, 1), st.integers(1, 30))
def test_cubic_is_the_published_law(initial: float, fraction: float, steps: int) -> None:
    final = initial + (1 - initial) * fraction
    schedule = cubic(final, begin=7, end=7 + steps, initial=initial)
    for i in range(steps + 1):
        law = final + (initial - final) * (1 - i / steps) ** 3
        assert math.isclose(schedule(7 + i), law, rel_tol=1e-12, abs_tol=1e-12)
    assert schedule == polynomial(final, 7, 7 + steps, initial=initial, degree=3)


def test_schedule_that_used_to_miss_its_target_meets_it() -> None:
    schedule = cubic(0.95, begin=1, end=40, every=5, initial=0.05)
    assert list(schedule.steps()) == [1, 6, 11, 16, 21, 26, 31, 36, 40]
    assert schedule(36) == pytest.approx(0.95 - 0.9 * (4 / 39) ** 3, abs=1e-15)
    assert schedule(40) == 0.95


def test_linear_prunes_equal_counts() -> None:
    schedule = linear(0.9, begin=10, end=16, initial=0.3)
    assert [schedule(s) for s in range(10, 17)] == pytest.approx([0.3 + 0.1 * i for i in range(7)])


def test_geometric_prunes_equal_fractions_of_what_is_left() -> None:
    schedule = geometric(0.98, begin=5, end=20, initial=0.2)
    densities = [1 - schedule(step) for step in range(5, 21)]
    ratios = [b / a for a, b in pairwise(densities)]
    assert ratios == pytest.approx([(0.02 / 0.8) ** (1 / 15)] * 15)


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (0.98, [0.5, 0.74, 0.86, 0.92, 0.95, 0.965, 0.98]),
        (0.93, [0.5, 0.715, 0.8225, 0.87625, 0.903125, 0.9165625, 0.93]),
        (0.5, [0.5]),
        (0.3, [0.3]),
    ],
)
def test_halving_is_the_published_table(final: float, expected: list[float]) -> None:
    schedule = halving(final, begin=8, every=4)
    steps = list(schedule.steps())
    assert steps == list(range(8, 8 + 4 * len(expected), 4))
    assert [schedule(step) for step in steps] == pytest.approx(expected, abs=1e-15)
    assert schedule(steps[-1]) == final


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 8))
def test_halving_halves_what_is_missing(final: float, initial: float, steps: int) -> None:
    schedule = halving(final, steps=steps, initial=initial)
    path = [schedule(step) for step in schedule.steps()]
    assert path[-1] == final
    missing = [final - sparsity for sparsity in path[:-1]]
    for i, gap in enumerate(missing):
        assert math.isclose(gap, (final - initial) * 0.5**i, rel_tol=1e-9, abs_tol=1e-12)
    assert len(path) == (steps + 2 if final > initial else 1)


def test_constant_has_no_end_unless_given() -> None:
    schedule = constant(0.7, begin=3, every=4)
    assert [schedule(step) for step in (0, 2, 3, 1000)] == [0.0, 0.0, 0.7, 0.7]
    assert list(islice(schedule.steps(), 3)) == [3, 7, 11]
    assert [step for step in range(12) if schedule.is_due(step)] == [3, 7, 11]
    assert list(constant(0.7, begin=3, end=9, every=4).steps()) == [3, 7, 9]


def test_one_shot_is_due_once() -> None:
    schedule = one_shot(0.6, at=5)
    assert [step for step in range(20) if schedule.is_due(step)] == [5]
    assert (schedule(4), schedule(5), schedule(6)) == (0.0, 0.6, 0.6)


def test_schedules_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        cubic(0.9, 0, 10).final = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("kind", "make"), [("linear", linear), ("cubic", cubic), ("geometric", geometric)]
)
@given(initial=st.floats(0, 0.5), final=st.floats(0.5, 0.999), steps=st.integers(1, 40))
def test_path_has_the_values_of_the_schedule(
    kind: str, make: Callable[..., Schedule], initial: float, final: float, steps: int
) -> None:
    path = sparsity_path(kind, final, steps, initial)
    schedule = make(final, begin=100, end=100 + steps, initial=initial)
    assert path == [schedule(100 + i) for i in range(1, steps + 1)]
    assert path[-1] == final


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_amounts_compound_to_the_sparsities(sparsities: list[float]) -> None:
    left, previous = 1.0, 0.0
    for sparsity in sorted(sparsities):
        amount = amount_between(previous, sparsity)
        assert 0.0 <= amount <= 1.0
        left *= 1 - amount
        assert math.isclose(left, 1 - sparsity, rel_tol=1e-9, abs_tol=1e-12)
        previous = sparsity


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear(0.2, 0, 5, initial=0.5), ArgumentError, "`final` of at least `initial`"),
        (lambda: cubic(1.2, 0, 5), ArgumentError, "`final` in"),
        (lambda: cubic(0.9, 0, 5, initial=-0.1), ArgumentError, "`initial` in"),
        (lambda: cubic(0.9, 5, 4), ArgumentError, "`end` of at least 5"),
        (lambda: cubic(0.9, -1, 4), ArgumentError, "`begin` of at least 0"),
        (lambda: cubic(0.9, 0, 4, every=0), ArgumentError, "`every` of at least 1"),
        (lambda: constant(True), ArgumentTypeError, "`final` to be a number"),
        (lambda: Schedule("polynomial", 0.9), ArgumentTypeError, "`end` to be an int"),
        (lambda: Schedule("stepwise", 0.9), ArgumentError, "`kind` to be one of"),
        (lambda: polynomial(0.9, 0, 4, degree=0), ArgumentError, "`degree` to be positive"),
        (lambda: geometric(1.0, 0, 4), ArgumentError, r"`final` in \[0, 1\)"),
        (lambda: halving(0.9, steps=-1), ArgumentError, "`steps` of at least 0"),
        (lambda: halving(0.9, begin=-1), ArgumentError, "`begin` of at least 0"),
        (lambda: halving(0.2, begin=-1), ArgumentError, "`begin` of at least 0"),
        (lambda: halving(0.9, every=0), ArgumentError, "`every` of at least 1"),
        (lambda: halving(0.9, initial=1.2), ArgumentError, "`initial` in"),
        (lambda: sparsity_path("constant", 0.9, 4), ArgumentError, "`kind` to be one of"),
        (lambda: sparsity_path("cubic", 0.9, 0), ArgumentError, "`steps` of at least 1"),
        (lambda: amount_between(0.5, 0.4), ArgumentError, "`target` of at least `previous`"),
        (lambda: amount_between(0.5, 1.4), ArgumentError, "`target` in"),
        (lambda: Schedule.from_state_dict({"kind": "cubic"}), ArgumentError, "Expected the keys"),
    ],
)
def test_impossible_schedules_are_refused(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


LAWS: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "cubic": cubic,
    "geometric": geometric,
}


@given(
    st.sampled_from(sorted(LAWS)),
    st.integers(0, 50),
    st.integers(0, 200),
    st.integers(1, 30),
)
def test_any_length_is_spread_over_at_most_so_many_times(
    law: str, begin: int, length: int, times: int
) -> None:
    schedule = LAWS[law](0.8, begin, begin + length, times=times)
    steps = list(schedule.steps())
    assert len([step for step in steps if step > begin]) <= times
    assert len(steps) > min(length, times) / 2
    assert schedule(steps[-1]) == 0.8
    with pytest.raises(ArgumentError, match="either `every` or `times`"):
        LAWS[law](0.8, begin, begin + length, every=2, times=times)


@pytest.mark.parametrize("steps", range(1, 25))
def test_the_schedule_of_the_readme_takes_trainings_of_any_length(steps: int) -> None:
    schedule = cubic(0.8, begin=steps // 4, end=3 * steps // 4, times=10)
    assert schedule(steps) == 0.8
    assert all(step <= steps for step in schedule.steps())
    with pytest.raises(ArgumentError, match="`times` of at least 1"):
        cubic(0.8, 0, steps, times=0)
