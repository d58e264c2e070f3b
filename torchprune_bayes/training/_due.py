"""What a schedule requires: which tensors follow it, when, and how many entries to prune."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from torch.nn.utils.prune import BasePruningMethod

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.costs import flops_per_weight
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import Schedule
from torchprune_bayes.types import Masks

Schedules: TypeAlias = Schedule | Mapping[Any, Schedule]


def schedule_groups(schedule: Schedules, space: ParameterSpace) -> dict[Schedule, ParameterSpace]:
    """The tensors that follow each schedule.

    Raises:
        ArgumentTypeError: If it is neither a schedule nor a mapping to schedules.
        ArgumentError: If a tensor has no schedule, or a schedule has no tensor.
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
    by_name = {names.get(key, key): value for key, value in schedule.items()}
    if set(by_name) != set(space.names):
        wrong = sorted(map(str, set(by_name) ^ set(space.names)))
        raise ArgumentError(
            f"Expected one schedule for each tensor, got a difference in {', '.join(wrong)}."
        )
    members: dict[Schedule, list[str]] = {}
    for name in space.names:
        members.setdefault(by_name[name], []).append(name)
    return {kind: space.subset(group) for kind, group in members.items()}


def due_step(schedule: Schedule, now: int) -> int | None:
    """The schedule's step that is executed at step ``now``; what is due at 0 is done at 1."""
    candidates = (now, 0) if now == 1 else (now,)
    return next((step for step in candidates if schedule.is_due(step)), None)


def entry_count(masks: Iterable[Tensor]) -> int:
    """Number of entries."""
    return sum(mask.numel() for mask in masks)


def pruned_count(masks: Iterable[Tensor]) -> int:
    """Number of pruned entries."""
    return sum(int((~mask).sum()) for mask in masks)


class Goal(Protocol):
    """What a schedule measures, and the arguments a method gets to reach it."""

    def arguments(
        self, space: ParameterSpace, schedule: Schedule, due: int
    ) -> dict[str, Any] | None:
        """Arguments of a method that reaches what is due, ``None`` if it is reached already."""

    def is_reached(self, space: ParameterSpace, schedule: Schedule) -> bool:
        """Whether the end of the schedule is reached."""
        ...


class SparsityGoal:
    """A schedule of sparsities, exact to the entry.

    Args:
        by_layer: Whether each tensor has the sparsity, or all of them jointly.
        group_size: Entries that a method prunes as one group.
    """

    def __init__(self, *, by_layer: bool, group_size: int) -> None:
        self._by_layer, self._group_size = by_layer, group_size

    @classmethod
    def of(cls, method: BasePruningMethod) -> SparsityGoal:
        """The goal as ``method`` counts it: by layer or not, in groups of a pattern or not."""
        pattern = getattr(method, "pattern", None)
        by_layer = getattr(method, "scope", "global") == "layer"
        if pattern is None or not pattern.takes_whole_groups:
            return cls(by_layer=by_layer, group_size=1)
        return cls(by_layer=by_layer, group_size=pattern.size)

    def arguments(
        self, space: ParameterSpace, schedule: Schedule, due: int
    ) -> dict[str, Any] | None:
        """The number of entries to prune, for each tensor or in all."""
        amount = self._missing(space.masks(), schedule(due))
        return {"amount": amount} if amount else None

    def is_reached(self, space: ParameterSpace, schedule: Schedule) -> bool:
        """Whether the sparsity is reached."""
        return not self._missing(space.masks(), schedule.final)

    def _missing(self, masks: Masks, sparsity: float) -> int | dict[str, int]:
        if not self._by_layer:
            return shortfall(masks.values(), sparsity, self._group_size)
        counts = {
            name: shortfall([mask], sparsity, self._group_size) for name, mask in masks.items()
        }
        return counts if any(counts.values()) else 0


def flops_arguments(budget: float) -> dict[str, Any]:
    """Arguments of a method that keep this share of the dense FLOPs."""
    return {"amount": None, "flops_target": budget}


class FlopsGoal:
    """A share of the dense FLOPs to keep in the end, approached along the schedule.

    When the schedule is at a sparsity ``s``, ``s / final`` of the FLOPs to remove are removed.

    Args:
        target: Share of the dense FLOPs of these tensors to keep.
        calibration: The cost of each weight is counted on one of its samples, once.
    """

    def __init__(self, target: float, calibration: Calibration) -> None:
        self._target, self._calibration = target, calibration

    def arguments(
        self, space: ParameterSpace, schedule: Schedule, due: int
    ) -> dict[str, Any] | None:
        """The share of the FLOPs to keep at this step."""
        share = schedule(due) / schedule.final if schedule.final else 1.0
        budget = 1.0 - share * (1.0 - self._target)
        return flops_arguments(budget) if self._kept(space) > budget else None

    def is_reached(self, space: ParameterSpace, schedule: Schedule) -> bool:
        """Whether no more FLOPs are left than the target."""
        return self._kept(space) <= self._target

    @cached_property
    def _costs(self) -> dict[str, float]:
        return flops_per_weight(self._calibration)

    def _kept(self, space: ParameterSpace) -> float:
        masks = space.masks()
        dense = sum(self._costs[name] * mask.numel() for name, mask in masks.items())
        return sum(self._costs[name] * int(mask.sum()) for name, mask in masks.items()) / dense


def shortfall(masks: Iterable[Tensor], sparsity: float, group_size: int) -> int:
    """Entries to prune until the sparsity, in whole groups of ``group_size`` entries."""
    masks = list(masks)
    missing = round(sparsity * entry_count(masks) / group_size) * group_size - pruned_count(masks)
    return max(missing // group_size, 0) * group_size
