"""Shrinking a model step by step, with restoration if something fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.structured._cutting import RepairReport, cut_with
from torchprune_bayes.structured._recipe import Recipe
from torchprune_bayes.structured._replacement import Change
from torchprune_bayes.structured._verification import check_equal
from torchprune_bayes.structured.curves import LossCurve
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.measured_costs import MeasuredCosts
from torchprune_bayes.structured.ranking import (
    Ranking,
    blocks_below,
    blocks_to_reach,
    left_to_reach,
)
from torchprune_bayes.structured.repair import repair
from torchprune_bayes.structured.slicing import (
    ShrinkPlan,
    apply_plan,
    groups_after,
    plan_of,
)
from torchprune_bayes.structured.unit_costs import UnitCosts
from torchprune_bayes.wiring.forward import ForwardFunction

Target: TypeAlias = Literal["params", "channels", "flops", "latency", "memory", "evidence"]


class Shrinking:
    """Cuts a model in steps and keeps the old tensors, so that everything can be undone.

    Args:
        model: The model, without wrappers; changed in place.
        groups: Its groups.
        recipe: How units are scored, ranked and compensated, again in every step.
        costs: Costs of the whole model, counted.
        measured: Measured costs, if the target is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        recipe: Recipe,
        costs: UnitCosts,
        measured: MeasuredCosts | None = None,
    ) -> None:
        self.model, self.recipe, self.costs, self.measured = model, recipe, costs, measured
        self.original, self.groups = list(groups), list(groups)
        self.remaining = {group.name: torch.arange(group.units) for group in groups}
        self.changes: list[Change] = []
        self.steps = 0
        self.curves: list[LossCurve] = []
        self.repairs: list[RepairReport] = []
        self._prepared = False

    def step(self, target: Target, sparsity: float | None) -> None:
        """Score the remaining units and remove as many as a sparsity of the whole needs."""
        importance = self.recipe.importance
        if importance.needs_recalibration or not self._prepared:
            importance.prepare(self.model, self.groups)
            self._prepared = True
        scores = {
            group.name: result
            for group in self.groups
            if (result := importance.score(group, self.model)) is not None
        }
        resource = None if target == "evidence" else target
        ranking, self.curves = self.recipe.ranking(
            self.model, self.groups, scores, self.measured or self.costs, resource, self.steps
        )
        kept = ranking.best(self._left(ranking, target, sparsity))
        if kept:
            self._cut(kept)

    def left(self) -> dict[str, int]:
        """Return how many units each group has."""
        return {group.name: group.units for group in self.groups}

    def whole_plan(self) -> ShrinkPlan:
        """Return the plan that leads from the model at the start to the present one."""
        self.undo()
        try:
            return plan_of(self.model, self.original, self.remaining)
        finally:
            self._redo()

    def replaced(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the first and the present parameter under each name where they differ."""
        pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for change in self.changes:
            for name, (old, new) in change.parameters.items():
                pairs[name] = (pairs[name][0] if name in pairs else old, new)
        return pairs

    def difference(
        self,
        plan: ShrinkPlan,
        example_inputs: Any,
        forward_fn: ForwardFunction | None,
        operations: Sequence[str] = (),
    ) -> float:
        """Compare the whole model after the cut with itself, with zeros for removed entries.

        Arguments are those of :func:`~torchprune_bayes.structured._verification.check_equal`.

        Raises:
            ArgumentError: If there is nothing to compare.
            ParameterError: If the cut model does not run.
            NumericalError: If they compute different things.
        """
        self.undo()
        try:
            return check_equal(self.model, plan, example_inputs, forward_fn, operations)
        finally:
            self._redo()

    def undo(self) -> None:
        """Restore everything from the start."""
        for change in reversed(self.changes):
            change.undo()

    def _redo(self) -> None:
        for change in self.changes:
            change.redo()

    def _left(self, ranking: Ranking, target: Target, sparsity: float | None) -> dict[str, int]:
        if target == "evidence" or sparsity is None:
            threshold = self.recipe.importance.threshold
            return ranking.left(0 if threshold is None else blocks_below(ranking, threshold))
        if self.measured is not None:  # every look costs a measurement, and noise would put back
            return ranking.left(blocks_to_reach(ranking, self.measured, target, sparsity))
        return left_to_reach(ranking, self.costs, target, sparsity)

    def _cut(self, kept: Mapping[str, Tensor]) -> None:
        values = self.recipe.importance.update(self.model, self.groups, kept)
        plan = plan_of(self.model, self.groups, kept)
        calibration = self._repairs_with(values)
        if calibration is None:
            self.changes.append(apply_plan(self.model, plan, values=values))
        else:
            result = repair(calibration, self.groups, kept)
            change, report = cut_with(calibration, self.groups, plan, result)
            self.changes.append(change)
            self.repairs.append(report)
        self.groups = groups_after(self.groups, plan, kept)
        for name, units in kept.items():
            self.remaining[name] = self.remaining[name][units]
        self.steps += 1

    def _repairs_with(self, values: Mapping[str, Tensor] | None) -> Calibration | None:
        """The data to repair with, unless the importance has moved the weights already."""
        calibration, wanted = self.recipe.calibration, self.recipe.repair
        if calibration is None or wanted == "none" or (wanted == "auto" and values is not None):
            return None
        return calibration.redrawn(self.steps)
