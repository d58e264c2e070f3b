"""A model on its way to a smaller one, step by step, and back if something fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torchprune_bayes.structured._replacement import Change
from torchprune_bayes.structured._verification import check_equal
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.ranking import (
    Line,
    Scope,
    blocks_below,
    blocks_to_reach,
    line_up,
)
from torchprune_bayes.structured.slicing import (
    ShrinkPlan,
    apply_plan,
    groups_after,
    plan_of,
)
from torchprune_bayes.structured.unit_costs import UnitCosts
from torchprune_bayes.wiring._forward import ForwardFunction

if TYPE_CHECKING:
    from torchprune_bayes.structured.importance import UnitImportance

Target: TypeAlias = Literal["params", "channels", "flops", "evidence"]


class Shrinking:
    """Cuts a model in steps and keeps what was there, so that all can be undone.

    Args:
        model: The model, without wrappers; changed in place.
        groups: Its groups.
        importance: Scores the units anew in every step.
        costs: Costs of the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        importance: UnitImportance,
        costs: UnitCosts,
    ) -> None:
        self.model, self.importance, self.costs = model, importance, costs
        self.original, self.groups = list(groups), list(groups)
        self.alive = {group.name: torch.arange(group.units) for group in groups}
        self.changes: list[Change] = []
        self.steps = 0
        self._prepared = False

    def step(
        self, target: Target, sparsity: float | None, scope: Scope, min_keep: int, round_to: int
    ) -> None:
        """Score what is left and remove what it takes to reach a sparsity of the whole."""
        if self.importance.needs_recalibration or not self._prepared:
            self.importance.prepare(self.model, self.groups)
            self._prepared = True
        scores = {
            group.name: found
            for group in self.groups
            if (found := self.importance.score(group, self.model)) is not None
        }
        line = line_up(self.groups, scores, scope=scope, min_keep=min_keep, round_to=round_to)
        kept = line.kept(self._blocks(line, target, sparsity))
        if kept:
            self._cut(kept)

    def left(self) -> dict[str, int]:
        """Return how many units each group has."""
        return {group.name: group.units for group in self.groups}

    def whole_plan(self) -> ShrinkPlan:
        """Return the plan that leads from the model at the start to the present one."""
        self.undo()
        try:
            return plan_of(self.model, self.original, self.alive)
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
        self, plan: ShrinkPlan, example_inputs: Any, forward_fn: ForwardFunction | None
    ) -> float:
        """Compare the whole model after the cut with itself, with zeros in place of what is gone.

        Raises:
            ArgumentError: If there is nothing to compare.
            ParameterError: If the cut model does not run.
            NumericalError: If they compute different things.
        """
        self.undo()
        try:
            return check_equal(self.model, plan, example_inputs, forward_fn)
        finally:
            self._redo()

    def undo(self) -> None:
        """Put everything back that was there at the start."""
        for change in reversed(self.changes):
            change.undo()

    def _redo(self) -> None:
        for change in self.changes:
            change.redo()

    def _blocks(self, line: Line, target: Target, sparsity: float | None) -> int:
        if target == "evidence" or sparsity is None:
            threshold = self.importance.threshold
            return 0 if threshold is None else blocks_below(line, threshold)
        return blocks_to_reach(line, self.costs, target, sparsity)

    def _cut(self, kept: Mapping[str, Tensor]) -> None:
        values = self.importance.update(self.model, self.groups, kept)
        plan = plan_of(self.model, self.groups, kept)
        self.changes.append(apply_plan(self.model, plan, values=values))
        self.groups = groups_after(self.groups, plan, kept)
        for name, units in kept.items():
            self.alive[name] = self.alive[name][units]
        self.steps += 1
