"""What schedules have due: which tensors follow one, when, and how many entries are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import Schedule

Schedules: TypeAlias = Schedule | Mapping[Any, Schedule]


def schedule_groups(schedule: Schedules, space: ParameterSpace) -> dict[Schedule, ParameterSpace]:
    """The tensors that follow each schedule.

    Raises:
        ArgumentTypeError: If it is no schedule and no mapping to schedules.
        ArgumentError: If a tensor has none, or a schedule has no tensor.
    """
    if isinstance(schedule, Schedule):
        return {schedule: space}
    if not isinstance(schedule, Mapping) or not all(
        isinstance(value, Schedule) for value in schedule.values()
    ):
        raise ArgumentTypeError(
            f"Expected a Schedule or a mapping from tensors to them, got {schedule!r}."
        )
    names: dict[Any, str] = dict(zip(space.pairs(), space.names, strict=True))
    given = {names.get(key, key): value for key, value in schedule.items()}
    if set(given) != set(space.names):
        wrong = sorted(map(str, set(given) ^ set(space.names)))
        raise ArgumentError(
            f"Expected one schedule for each tensor, got a difference in {', '.join(wrong)}."
        )
    members: dict[Schedule, list[str]] = {}
    for name in space.names:
        members.setdefault(given[name], []).append(name)
    return {kind: space.subset(group) for kind, group in members.items()}


def due_step(schedule: Schedule, now: int) -> int | None:
    """The step of the schedule that is done at step ``now``; what is due at 0 is done at 1."""
    candidates = (now, 0) if now == 1 else (now,)
    return next((step for step in candidates if schedule.is_due(step)), None)


def entry_count(masks: Iterable[Tensor]) -> int:
    """Number of entries."""
    return sum(mask.numel() for mask in masks)


def pruned_count(masks: Iterable[Tensor]) -> int:
    """Number of pruned entries."""
    return sum(int((~mask).sum()) for mask in masks)


def shortfall(masks: Iterable[Tensor], sparsity: float, together: int) -> int:
    """Entries to prune until the sparsity, in whole groups of ``together`` entries."""
    masks = list(masks)
    missing = round(sparsity * entry_count(masks) / together) * together - pruned_count(masks)
    return max(missing // together, 0) * together
