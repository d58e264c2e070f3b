"""How many entries a method prunes at each of its steps, and which."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune_bayes._checks import count_to_prune
from torchprune_bayes._numerics.selection import keep_strictly_above, smallest_k, within_budget
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.schedules import sparsity_path
from torchprune_bayes.types import Masks, Scores


@dataclass(frozen=True)
class Target:
    """A pruning target, reached in ``steps`` steps.

    Args:
        initial: Remaining entries before the first step.
        amount: Fraction or number of them to prune in all, or the number for each tensor.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` each on its own.
        steps: Number of steps.
        path: How the sparsity grows over the steps: ``"cubic"``, ``"geometric"``, ``"linear"``.
        costs: FLOPs per weight, by name, for ``flops_target``.
        flops_target: Share of the dense FLOPs of these tensors to keep, instead of ``amount``.
        strict: The papers' threshold, which keeps a weight only if its score is strictly above
            the k-th largest, so one weight and all ties more are pruned.
    """

    initial: Masks
    amount: float | int | Mapping[str, int]
    scope: str = "global"
    steps: int = 1
    path: str = "cubic"
    costs: Mapping[str, float] | None = None
    flops_target: float | None = None
    strict: bool = False

    def keep(self, step: int, scores: Scores, masks: Masks) -> Masks:
        """Masks after ``step`` (from 0), pruning the smallest scores of the remaining entries."""
        if self.flops_target is not None:
            return self._within_flops(step, scores, masks)
        kept: Masks = {}
        for names in self._groups:
            masks_of_group = self._keep_in_group(step, names, scores, masks)
            kept |= dict(zip(names, masks_of_group, strict=True))
        return kept

    def share(self, step: int, masks: Masks) -> float:
        """The share of the remaining entries that ``step`` prunes; with FLOPs, of their FLOPs."""
        if self.flops_target is not None:
            budget, spent = self._budget(step, masks)
            return min(max(1.0 - budget / spent, 0.0), 1.0) if spent else 0.0
        counts = _count([list(self.initial.values()), list(masks.values())])
        starts = _count([[self.initial[name] for name in names] for names in self._groups])
        goals = zip(self._groups, starts, strict=True)
        goal = sum(self._goal(step, names, start)[1] for names, start in goals)
        return max(goal - (counts[0] - counts[1]), 0) / max(counts[1], 1)

    @property
    def _groups(self) -> list[list[str]]:
        names = list(self.initial)
        return [[name] for name in names] if self.scope == "layer" else [names]

    def _keep_in_group(
        self, step: int, names: list[str], scores: Scores, masks: Masks
    ) -> list[Tensor]:
        ranked, remaining = [scores[name] for name in names], [masks[name] for name in names]
        start, left = _count([[self.initial[name] for name in names], remaining])
        share, goal = self._goal(step, names, start)
        if self.strict:
            pruned = 1.0 - start / sum(mask.numel() for mask in remaining)
            return keep_strictly_above(ranked, share + (1.0 - share) * pruned, remaining)
        return smallest_k(ranked, max(goal - (start - left), 0), remaining)

    def _goal(self, step: int, names: list[str], start: int) -> tuple[float, int]:
        """Share and number of the entries remaining at first that are pruned after ``step``."""
        amount = self._amount_of(names)
        total = count_to_prune(amount, start)
        is_count = isinstance(amount, numbers.Integral)
        final = total / max(start, 1) if is_count else float(amount)
        share = sparsity_path(self.path, final, self.steps)[step]
        return share, total if self._is_last(step) else round(share * start)

    def _within_flops(self, step: int, scores: Scores, masks: Masks) -> Masks:
        costs, (budget, _) = self._costs_of(masks), self._budget(step, masks)
        ranked = [scores[name] for name in masks]
        kept = within_budget(ranked, costs, budget, list(masks.values()))
        return dict(zip(masks, kept, strict=True))

    def _budget(self, step: int, masks: Masks) -> tuple[float, float]:
        """FLOPs that the kept entries may have after ``step``, and those of ``masks``."""
        assert self.flops_target is not None
        costs = self._costs_of(masks)
        entries = _count([[self.initial[name]] for name in masks] + [[m] for m in masks.values()])
        dense = sum(c * mask.numel() for c, mask in zip(costs, masks.values(), strict=True))
        start = sum(c * n for c, n in zip(costs, entries[: len(masks)], strict=True))
        spent = sum(c * n for c, n in zip(costs, entries[len(masks) :], strict=True))
        budget = self.flops_target * dense
        if budget < start and not self._is_last(step):
            # The share of FLOPs to remove plays the part of the sparsity on the path.
            share = sparsity_path(self.path, 1.0 - budget / start, self.steps)[step]
            budget = (1.0 - share) * start
        return budget, spent

    def _costs_of(self, masks: Masks) -> list[float]:
        assert self.costs is not None
        return [self.costs[name] for name in masks]

    def _amount_of(self, names: list[str]) -> float | int:
        if not isinstance(self.amount, Mapping):
            return self.amount
        if set(self.amount) != set(self.initial):
            raise ArgumentError(
                f"Expected amounts for {', '.join(self.initial)}, got {', '.join(self.amount)}."
            )
        return self.amount[names[0]]

    def _is_last(self, step: int) -> bool:
        return step == self.steps - 1


def _count(groups: Sequence[Sequence[Tensor]]) -> list[int]:
    """Remaining entries of each group of masks, in one read from the device."""
    place = groups[0][0].device
    totals = [
        torch.stack([torch.count_nonzero(m).to(place) for m in masks]).sum() for masks in groups
    ]
    counts: list[int] = torch.stack(totals).tolist()
    return counts
