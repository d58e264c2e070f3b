"""Schedules: which sparsity is due at which training step; no framework, no state.

A schedule is a frozen value. It can be called with any step, in any order, and gives the same
answer after a resume. ``final`` is met exactly, at ``end``, even where ``every`` does not divide
``end - begin``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import chain, count
from typing import Any

from torchprune_bayes._checks import (
    check_choice,
    check_count,
    check_fraction,
    check_keys,
    check_positive,
)
from torchprune_bayes.errors import ArgumentError


@dataclass(frozen=True)
class Schedule:
    """Sparsity as a function of the step; made by :func:`cubic`, :func:`linear` and so on.

    The sparsity never falls: it is ``initial`` before ``begin``, follows the law named by
    ``kind``, and is ``final`` at ``end`` and after.

    Attributes:
        kind: The law in between: ``"constant"``, ``"polynomial"``, ``"geometric"`` or
            ``"halving"``.
        final: Sparsity from step ``end`` on, a fraction of the whole in [0, 1].
        begin: First step at which pruning is due.
        end: Last step at which pruning is due; ``None``, only if constant, for no last one.
        every: Number of steps from one pruning to the next.
        initial: Sparsity at ``begin``, from which the law starts.
        degree: Exponent of the polynomial law; the other kinds ignore it.

    Raises:
        ArgumentError: If a value is out of range, ``final`` is below ``initial``, ``end`` is
            before ``begin``, or a geometric law is to end at 1.
        ArgumentTypeError: If a value is not a number, or a step not an int.

    Example:
        >>> schedule = linear(final=0.8, begin=10, end=30, every=15)
        >>> [schedule(step) for step in (0, 10, 20, 30, 40)]
        [0.0, 0.0, 0.4, 0.8, 0.8]
        >>> list(schedule.steps())
        [10, 25, 30]
    """

    kind: str
    final: float
    begin: int = 0
    end: int | None = None
    every: int = 1
    initial: float = 0.0
    degree: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("constant", "polynomial", "geometric", "halving"))
        check_fraction("initial", self.initial)
        check_fraction("final", self.final, closed=self.kind != "geometric")
        check_count("begin", self.begin, minimum=0)
        check_count("every", self.every)
        check_positive("degree", self.degree)
        if self.final < self.initial:
            raise ArgumentError(
                f"Expected `final` of at least `initial` = {self.initial}, got {self.final}."
            )
        if self.end is not None or self.kind != "constant":
            check_count("end", self.end, minimum=self.begin)

    def __call__(self, step: int) -> float:
        """Give the sparsity of the whole that is meant to hold after ``step``."""
        if step < self.begin:
            return self.initial
        if self.end is None or step >= self.end or self.kind == "constant":
            return self.final
        progress = (step - self.begin) / (self.end - self.begin)
        if self.kind == "geometric":
            ratio = (1 - self.final) / (1 - self.initial)
            sparsity = 1 - (1 - self.initial) * ratio**progress
        elif self.kind == "halving":
            missing = 0.5 ** ((step - self.begin) / self.every)
            sparsity = self.final - (self.final - self.initial) * missing
        else:
            gain = 1 - (1 - progress) ** self.degree
            sparsity = self.initial + (self.final - self.initial) * gain
        return min(max(sparsity, self.initial), self.final)  # rounding may step outside

    def is_due(self, step: int) -> bool:
        """Tell whether to prune at ``step``: at ``begin``, each ``every`` steps, and at ``end``."""
        if step < self.begin or (self.end is not None and step > self.end):
            return False
        return step == self.end or (step - self.begin) % self.every == 0

    def steps(self) -> Iterator[int]:
        """Iterate over the steps at which pruning is due; without end if ``end`` is ``None``."""
        if self.end is None:
            return count(self.begin, self.every)
        return chain(range(self.begin, self.end, self.every), [self.end])

    def state_dict(self) -> dict[str, Any]:
        """Give the fields as a plain dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Schedule:
        """Make the schedule again that gave ``state``.

        Raises:
            ArgumentError: If ``state`` has other keys than the fields, or bad values.

        Example:
            >>> schedule = cubic(final=0.9, begin=100, end=900, every=50)
            >>> Schedule.from_state_dict(schedule.state_dict()) == schedule
            True
        """
        names = {field.name for field in fields(cls)}
        check_keys("a schedule's state", state, names)
        return cls(**state)


def constant(final: float, begin: int = 0, end: int | None = None, every: int = 1) -> Schedule:
    """Hold one sparsity from ``begin`` on; arguments as in :class:`Schedule`.

    Example:
        >>> schedule = constant(0.5, begin=100)
        >>> schedule(99), schedule(100), schedule(5000)
        (0.0, 0.5, 0.5)
    """
    return Schedule("constant", final, begin, end, every)


def one_shot(final: float, at: int = 0) -> Schedule:
    """Prune once, at step ``at``.

    Example:
        >>> list(one_shot(0.5, at=100).steps())
        [100]
    """
    return Schedule("constant", final, begin=at, end=at)


def linear(
    final: float,
    begin: int,
    end: int,
    every: int | None = None,
    initial: float = 0.0,
    *,
    times: int | None = None,
) -> Schedule:
    """Prune the same number of entries each time; arguments as in :class:`Schedule`.

    Args:
        final: Sparsity at ``end`` and after.
        begin: First step at which pruning is due.
        end: Last one.
        every: Number of steps from one pruning to the next; 1 unless ``times`` is given.
        initial: Sparsity at ``begin``.
        times: Instead of ``every``: prune so many times after ``begin`` at most, spread evenly, and
            fewer times where there are fewer steps. For trainings whose length is not known.

    Raises:
        ArgumentError: If a value is out of range, or both ``every`` and ``times`` are given.

    Example:
        >>> linear(0.8, begin=0, end=4)(1)
        0.2
        >>> list(linear(0.8, begin=25, end=75, times=5).steps())
        [25, 35, 45, 55, 65, 75]
    """
    return Schedule(
        "polynomial", final, begin, end, _spacing(begin, end, every, times), initial, degree=1.0
    )


def cubic(
    final: float,
    begin: int,
    end: int,
    every: int | None = None,
    initial: float = 0.0,
    *,
    times: int | None = None,
) -> Schedule:
    """Prune fast at first and slowly at last; arguments as in :func:`linear`.

    Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), eq. 1:
    ``s(t) = final + (initial - final) * (1 - (t - begin) / (end - begin)) ** 3``.

    Example:
        >>> round(cubic(0.8, begin=0, end=2)(1), 6)
        0.7
    """
    return Schedule(
        "polynomial", final, begin, end, _spacing(begin, end, every, times), initial, degree=3.0
    )


def polynomial(
    final: float,
    begin: int,
    end: int,
    every: int | None = None,
    initial: float = 0.0,
    *,
    degree: float,
    times: int | None = None,
) -> Schedule:
    """Follow the law of :func:`cubic` with another exponent; arguments as in :func:`linear`.

    Example:
        >>> round(polynomial(0.8, begin=0, end=2, degree=2)(1), 6)
        0.6
    """
    return Schedule(
        "polynomial", final, begin, end, _spacing(begin, end, every, times), initial, degree
    )


def geometric(
    final: float,
    begin: int,
    end: int,
    every: int | None = None,
    initial: float = 0.0,
    *,
    times: int | None = None,
) -> Schedule:
    """Prune the same fraction of what is left each time; arguments as in :func:`linear`.

    ``1 - s(t) = (1 - initial) * ((1 - final) / (1 - initial)) ** progress``, so ``final`` must
    be below 1.

    Example:
        >>> geometric(0.75, begin=0, end=2)(1)
        0.5
    """
    return Schedule("geometric", final, begin, end, _spacing(begin, end, every, times), initial)


def _spacing(begin: int, end: int, every: int | None, times: int | None) -> int:
    """Steps from one pruning to the next."""
    if times is None:
        return 1 if every is None else every
    if every is not None:
        raise ArgumentError(f"Expected either `every` or `times`, got {every} and {times}.")
    check_count("times", times)
    check_count("begin", begin, minimum=0)
    check_count("end", end, minimum=begin)
    return max(-(-(end - begin) // times), 1)


def halving(
    final: float, begin: int = 0, every: int = 1, *, steps: int = 5, initial: float = 0.5
) -> Schedule:
    """Start at ``initial``, halve what is missing ``steps`` times, then prune the rest.

    The schedule of SNIP-it (Verdenius et al., arXiv 2006.00896): ``final - (final - initial) *
    2 ** -i`` at ``begin + i * every`` for ``i = 0, ..., steps``, and ``final`` at the event after
    these, ``steps + 2`` events in all. A ``final`` of at most ``initial`` is pruned at once, at
    ``begin``. With the delay and the frequency of the paper's training runs, ``begin`` is
    ``delay + frequency`` and ``every`` is ``frequency``.

    Args:
        final: Sparsity after the last event.
        begin: Step of the first event.
        every: Number of steps from one event to the next.
        steps: How often what is missing is halved.
        initial: Sparsity after the first event.

    Raises:
        ArgumentError: If a value is out of range.
        ArgumentTypeError: If a value is no number, or a step no int.

    Example:
        >>> schedule = halving(0.98, begin=8, every=4)
        >>> [(step, round(schedule(step), 3)) for step in schedule.steps()]
        [(8, 0.5), (12, 0.74), (16, 0.86), (20, 0.92), (24, 0.95), (28, 0.965), (32, 0.98)]
    """
    check_fraction("initial", initial)
    check_fraction("final", final)
    check_count("steps", steps, minimum=0)
    check_count("every", every)
    check_count("begin", begin, minimum=0)
    if final <= initial:
        return one_shot(final, at=begin)
    return Schedule("halving", final, begin, begin + (steps + 1) * every, every, initial)


def sparsity_path(kind: str, final: float, steps: int, initial: float = 0.0) -> list[float]:
    """Give the sparsity after each of ``steps`` sub-steps that lead from ``initial`` to ``final``.

    Args:
        kind: ``"linear"``, ``"cubic"`` or ``"geometric"``, as the functions of that name.
        final: Sparsity after the last sub-step, which it equals exactly.
        steps: Number of sub-steps.
        initial: Sparsity before the first sub-step, not part of the path.

    Returns:
        ``steps`` sparsities that never fall.

    Raises:
        ArgumentError: If an argument is out of range.
        ArgumentTypeError: If ``steps`` is no int or a sparsity no number.

    Example:
        >>> sparsity_path("geometric", final=0.9375, steps=4)
        [0.5, 0.75, 0.875, 0.9375]
    """
    kinds = {"linear": linear, "cubic": cubic, "geometric": geometric}
    check_choice("kind", kind, kinds)
    check_count("steps", steps)
    schedule = kinds[kind](final, begin=0, end=steps, initial=initial)
    return [schedule(step) for step in range(1, steps + 1)]


def amount_between(previous: float, target: float) -> float:
    """Turn two sparsities of the whole into PyTorch's ``amount``, a fraction of what is left.

    Args:
        previous: Sparsity now, in [0, 1].
        target: Sparsity to reach, in [0, 1] and not below ``previous``.

    Returns:
        ``(target - previous) / (1 - previous)``, and 0 if nothing is left.

    Raises:
        ArgumentError: If a sparsity is outside [0, 1] or ``target`` is below ``previous``.
        ArgumentTypeError: If a sparsity is not a number.

    Example:
        >>> amount_between(0.5, 0.75)
        0.5
    """
    check_fraction("previous", previous)
    check_fraction("target", target)
    if target < previous:
        raise ArgumentError(f"Expected `target` of at least `previous` = {previous}, got {target}.")
    return (target - previous) / (1 - previous) if previous < 1 else 0.0
