"""Pruning in steps: score the remaining weights, prune a part, and score again."""

from __future__ import annotations

import numbers
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from torchprune_bayes._checks import check_choice, check_count, check_fraction, count_to_prune
from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import halving, sparsity_path
from torchprune_bayes.types import Decision, Masks, Scores

PATHS = ("halving", "geometric", "linear", "cubic")


@dataclass(frozen=True)
class RankedGroup:
    """Tensors that are ranked jointly, and the goal of each step.

    Attributes:
        names: The tensors.
        entries: Number of their entries, pruned or not.
        sparsities: Share of all entries that is pruned after each step.
        goals: Entries pruned after each step, of those that remained at the start.
    """

    names: list[str]
    entries: int
    sparsities: list[float]
    goals: list[int]

    def padded(self, steps: int) -> RankedGroup:
        """The same with its last step repeated, up to ``steps`` steps."""
        missing = steps - len(self.goals)
        sparsities = self.sparsities + self.sparsities[-1:] * missing
        return replace(self, sparsities=sparsities, goals=self.goals + self.goals[-1:] * missing)


class StepwisePruning(PruningMethod):
    """Base class of the methods that score, prune a part, and score the remaining weights again.

    Args:
        amount: Fraction or number of the remaining entries to prune.
        calibration: Data, model and loss.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` each on its own.
        steps: Number of steps; for the path ``"halving"`` how often the missing sparsity is halved.
        path: How the sparsity grows over the steps.
        start: First sparsity of the path ``"halving"``.
        min_keep_per_tensor: Remaining entries that each tensor keeps as far as the count allows.
    """

    regrows = False

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        calibration: Calibration | None = None,
        scope: str = "global",
        steps: int = 1,
        path: str = "geometric",
        start: float = 0.5,
        min_keep_per_tensor: int = 0,
    ) -> None:
        super().__init__(amount, calibration=calibration, scope=scope)
        check_choice("path", path, PATHS)
        check_count("steps", steps, minimum=0 if path == "halving" else 1)
        check_count("min_keep_per_tensor", min_keep_per_tensor, minimum=0)
        check_fraction("start", start)
        self.steps, self.path, self.start = steps, path, start
        self.min_keep_per_tensor = min_keep_per_tensor

    @abstractmethod
    def score(self, step: int, weights: Mapping[str, Tensor], masks: Masks) -> Scores:
        """Score the entries, with ``weights`` as they were and ``masks`` after the last step."""

    def scaled(
        self, scores: Scores, step: int, weights: Mapping[str, Tensor], masks: Masks
    ) -> Scores:
        """The last scores in the unit in which they are shown, which changes no ranking."""
        return scores

    def decide(self, space: ParameterSpace) -> Decision:
        """Choose masks step by step; the model is not changed.

        Args:
            space: The calibration's parameters.

        Raises:
            CalibrationError: If the data gave no usable gradients.
        """
        weights, remaining = space.values(), space.masks()
        groups = ranked_groups(remaining, self.amount, self.scope, self._sparsities)
        kept, reports = remaining, []
        steps = range(len(groups[0].goals)) if self.regrows else _steps_that_prune(groups)
        for index, step in enumerate(steps):
            scores = self.score(index, weights, kept)
            pool = remaining if self.regrows else kept
            chosen: Masks = {}
            for group in groups:
                done = sum(int((remaining[name] & ~pool[name]).sum()) for name in group.names)
                masks = self._keep(group, step, done, scores, pool)
                chosen |= dict(zip(group.names, masks, strict=True))
            reports.append(_report(kept, chosen))
            before, kept = kept, chosen
        return Decision(
            kept, scores=self.scaled(scores, index, weights, before), info={"steps": reports}
        )

    def _keep(
        self, group: RankedGroup, step: int, done: int, scores: Scores, pool: Masks
    ) -> list[Tensor]:
        """Masks of a group after ``step``, chosen from ``pool``, which lacks ``done`` entries."""
        ranked = [scores[name] for name in group.names]
        remaining = [pool[name] for name in group.names]
        k = max(group.goals[step] - done, 0)
        return smallest_k_with_floor(ranked, k, remaining, self.min_keep_per_tensor)

    def _sparsities(self, final: float, initial: float) -> list[float]:
        if self.path == "halving":
            schedule = halving(final, steps=self.steps, initial=self.start)
            return [schedule(step) for step in schedule.steps()]
        if final == 1.0:  # no geometric path leads to an empty network
            return [final]
        return sparsity_path(self.path, final, self.steps, initial)


def ranked_groups(
    remaining: Masks,
    amount: float | int | Mapping[str, int],
    scope: str,
    path: Callable[[float, float], list[float]],
) -> list[RankedGroup]:
    """Plan the counts of all steps.

    Args:
        remaining: Remaining entries before the first step.
        amount: Fraction or number of them to prune in all, or the number for each tensor.
        scope: ``"global"`` or ``"layer"``.
        path: Gives the sparsities after each step from the last one and the one at the start,
            all shares of all entries.

    Raises:
        ArgumentError: If more is to be pruned than remains, or amounts are for other tensors.
    """
    if isinstance(amount, Mapping) and set(amount) != set(remaining):
        raise ArgumentError(
            f"Expected amounts for {', '.join(remaining)}, got {', '.join(amount)}."
        )
    groups = []
    for names in [[name] for name in remaining] if scope == "layer" else [list(remaining)]:
        entries = sum(remaining[name].numel() for name in names)
        left = sum(int(remaining[name].sum()) for name in names)
        wanted = amount[names[0]] if isinstance(amount, Mapping) else amount
        total, gone = count_to_prune(wanted, left), entries - left
        # A fraction is used as given, not rounded to a count: the path is that of the papers.
        share = total / max(left, 1) if isinstance(wanted, numbers.Integral) else float(wanted)
        initial = gone / entries
        sparsities = path(min(initial + share * (1.0 - initial), 1.0), initial)
        before = [min(max(round(s * entries) - gone, 0), total) for s in sparsities[:-1]]
        groups.append(RankedGroup(names, entries, sparsities, [*before, total]))
    longest = max(len(group.goals) for group in groups)
    return [group.padded(longest) for group in groups]


def smallest_k_with_floor(
    scores: Sequence[Tensor], k: int, remaining: Sequence[Tensor], floor: int
) -> list[Tensor]:
    """As ``smallest_k``, but each tensor keeps its ``floor`` largest scores to the last.

    Exactly ``k`` entries go in any case: where they are more than there is above the floors, the
    smallest scores below the floors go too.
    """
    if not floor:
        return smallest_k(scores, k, remaining)
    counts = [int(mask.sum()) for mask in remaining]
    safe = [
        smallest_k([score], max(count - floor, 0), [mask])[0]
        for score, mask, count in zip(scores, remaining, counts, strict=True)
    ]
    free = [mask & ~held for mask, held in zip(remaining, safe, strict=True)]
    room = sum(int(mask.sum()) for mask in free)
    above = smallest_k(scores, min(k, room), free)
    held = smallest_k(scores, max(k - room, 0), safe)
    return [first | second for first, second in zip(above, held, strict=True)]


def _steps_that_prune(groups: list[RankedGroup]) -> list[int]:
    """Steps in which some group prunes something; the last one if there is none."""
    steps = range(len(groups[0].goals))
    before = [[0, *group.goals] for group in groups]
    effective = [step for step in steps if any(goals[step] < goals[step + 1] for goals in before)]
    return effective or [steps[-1]]


def _report(before: Masks, after: Masks) -> dict[str, Any]:
    """Report of a step, in plain values."""
    entries = sum(mask.numel() for mask in after.values())
    kept = sum(int(mask.sum()) for mask in after.values())
    revived = sum(int((after[name] & ~mask).sum()) for name, mask in before.items())
    return {"kept": kept, "sparsity": 1.0 - kept / entries, "revived": revived}
