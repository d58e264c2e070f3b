"""One pruning step: score the remaining weights, choose, and update the kept ones.

In plain words: a step has one set of gradients, taken at the weights where it begins. It may score
and choose in several stages; each scores the remaining weights, with updates so far, while the
update is always computed from the weights that the gradients belong to. Nothing here changes a
model.

Legend: ``D`` remaining entries where the step begins, in the order of its Fisher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from torchprune_bayes._numerics.cholesky import checked_once
from torchprune_bayes.calibration import Calibration, MeanLoss
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.methods._target import Target
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision, Masks, Scores

Update = Literal["none", "single", "joint"]
_MOST_FOR_TRIALS = 2_000_000


@dataclass(frozen=True)
class StepReport:
    """Choices of a step.

    Attributes:
        sparsity: Share of all entries that is pruned after it.
        block_size: Blocks of the Fisher.
        damping: ``λ``.
        mean_square: Mean squared gradient, the unit of ``λ``; ``None`` where it was not needed.
        scale: Applied share of the update.
        gradient_step: ``η``.
        loss: Held-out loss after it; ``None`` where nothing was to be chosen.
        in_sample: Whether that loss is one of the samples that the gradients are from.
    """

    sparsity: float
    block_size: int | str
    damping: float
    mean_square: float | None
    scale: float
    gradient_step: float
    loss: float | None
    in_sample: bool | None


@dataclass(frozen=True)
class State:
    """Where a run stands after some steps."""

    weights: dict[str, Tensor]
    masks: Masks
    scores: Scores | None = None
    reports: tuple[StepReport, ...] = ()

    @classmethod
    def of(cls, space: ParameterSpace) -> State:
        """The start, at the present model."""
        return cls(space.values(), space.masks())

    @property
    def last(self) -> StepReport | None:
        """The report of the last step, if there was one."""
        return self.reports[-1] if self.reports else None

    def decision(self, *, moved: bool, **info: Any) -> Decision:
        """The decision that the run leads to.

        Args:
            moved: Whether weights were updated, so that there are values to write.
            info: Further plain values of the report.
        """
        steps = [asdict(report) for report in self.reports]
        updates = self.weights if moved else None
        return Decision(self.masks, updates, self.scores, {"steps": steps, **info})


@dataclass(frozen=True)
class Step:
    """Start of a step.

    Attributes:
        index: From 0.
        fisher: Of gradients at ``weights``.
        weights: By qualified name.
        masks: Remaining entries.
        target: How many entries are to go by the end of each stage of each step.
        stages: The stages of this step, counted over all steps.
        last: The report of the step before.
        held_out: Where losses are measured, the same samples for all steps: with others at each
            step choices waver. ``None`` with a fitted curvature alone.
    """

    index: int
    fisher: EmpiricalFisher
    weights: dict[str, Tensor]
    masks: Masks
    target: Target
    stages: range
    last: StepReport | None
    held_out: Calibration | None

    @cached_property
    def flat(self) -> Tensor:
        """The weights ``[D]``."""
        return self.fisher.remaining.gather(self.weights)

    @cached_property
    def damping_unit(self) -> float:
        """Mean squared gradient."""
        return self.fisher.mean_square() or 1.0

    @property
    def known_unit(self) -> float | None:
        """The same if it was needed before."""
        return self.__dict__.get("damping_unit")

    def with_blocks(self, block_size: int | str) -> Step:
        """The same step with a Fisher of other blocks, whose unit of the damping is the same."""
        other = replace(self, fisher=self.fisher.with_blocks(block_size))
        if self.known_unit is not None:
            other.__dict__["damping_unit"] = self.known_unit
        return other

    @property
    def calibration(self) -> Calibration | None:
        """Where the gradients are from."""
        return self.fisher.calibration

    @property
    def is_large(self) -> bool:
        """See :func:`is_large`."""
        return is_large(self.fisher.remaining.numel)


@dataclass(frozen=True)
class Stage:
    """A part of a step that ends with a choice of masks.

    Attributes:
        step: The step.
        fisher: Of what remains before the stage, with the damping that is tried.
        index: Counted over all stages of all steps.
        masks: Remaining entries before it.
        weights: Their values with updates so far, ``[fisher.remaining.numel]``.
    """

    step: Step
    fisher: EmpiricalFisher
    index: int
    masks: Masks
    weights: Tensor

    @property
    def remaining(self) -> Tensor:
        """Which entries of the Fisher remain; it may hold pruned ones with gradients of zero."""
        return self.fisher.remaining.gather(self.masks)

    def smallest(self, scores: Scores) -> Masks:
        """Masks that prune the smallest scores."""
        return self.step.target.keep(self.index, scores, self.masks)


@dataclass(frozen=True)
class Procedure:
    """Procedure of one method in a step.

    Attributes:
        score: Importance score of every remaining entry, ``[D]`` of the stage's Fisher.
        select: Masks at the end of a stage, from the scores.
        update: Update of the kept weights.
        descends: Whether the kept weights may also move down the gradient.
        in_stages: Whether a step has all its stages, or ends with the first choice.
    """

    score: Callable[[Stage], Tensor]
    select: Callable[[Stage, Scores], Masks]
    update: Update
    descends: bool = False
    in_stages: bool = True

    def screening(self, stages: range) -> Procedure:
        """The same in one stage without a search, to compare dampings and blocks by."""
        if len(stages) == 1 and self.select is smallest:
            return self
        return replace(self, select=smallest, in_stages=False)


def is_large(entries: int) -> bool:
    """Whether there are so many that one trial of a damping costs more than the gradients."""
    return entries > _MOST_FOR_TRIALS


def smallest(stage: Stage, scores: Scores) -> Masks:
    """Prune the smallest scores."""
    return stage.smallest(scores)


@dataclass(frozen=True)
class Pruned:
    """Masks of a step at one damping, and possible updates of the kept weights.

    Attributes:
        step: The step.
        fisher: The Fisher with this damping and these blocks.
        masks: Kept entries.
        scores: Those of the last stage.
        moved: The weights after compensation, by name; zero where pruned.
        newton: The gradient step, by name, if allowed.
        losses: Held-out losses measured so far, by the shares of both moves.
    """

    step: Step
    fisher: EmpiricalFisher
    masks: Masks
    scores: Scores
    moved: dict[str, Tensor]
    newton: dict[str, Tensor] | None
    losses: dict[tuple[float, float], MeanLoss] = field(default_factory=dict, repr=False)

    def weights(self, scale: float, gradient_step: float) -> dict[str, Tensor]:
        """The kept weights after a share of both moves, by name; zero where pruned."""
        moved_weights = {}
        for name, mask in self.masks.items():
            start = self.step.weights[name]
            moved = torch.lerp(start, self.moved[name], scale)
            if gradient_step and self.newton is not None:
                moved = moved + gradient_step * self.newton[name]
            moved_weights[name] = torch.where(mask, moved, 0.0)
        return moved_weights

    def again(self, procedure: Procedure) -> Pruned:
        """The same step with the same damping and blocks by another procedure."""
        return prune_step(self.step, self.fisher.damping, procedure)


def prune_step(step: Step, damping: float, procedure: Procedure) -> Pruned:
    """Score, choose and compute the update, stage by stage.

    Each stage scores the weights that the last one moved, with what remains of the same Fisher. The
    update is always that of everything that the step has pruned so far. With one block it is found
    from the remaining entries alone: after a joint update the kept weights are at a minimum of the
    quadratic model, so that updates add up exactly. With many it is found from the blocks as the
    step cut them. For scores the entries that remain are cut anew, into blocks of the same size;
    beyond two million entries the step's blocks stay, and the factors of the update give the next
    stage's scores.

    Args:
        step: Its start.
        damping: ``λ``.
        procedure: What the method does.
    """
    return checked_once(lambda: _in_stages(step, damping, procedure))


def _in_stages(step: Step, damping: float, procedure: Procedure) -> Pruned:
    whole = step.fisher.restricted(step.masks, damping)
    fisher, masks, moved = whole, step.masks, step.weights
    adds_up = procedure.update == "joint" and len(fisher.blocks) == 1
    for index in step.stages if procedure.in_stages else step.stages[-1:]:
        left = (fisher if adds_up else whole).restricted(masks, damping)
        if not left.remaining.numel:
            break  # nothing is left for a further stage
        fisher = left if step.is_large else left.with_blocks(left.block_size)
        stage = Stage(step, fisher, index, masks, fisher.remaining.gather(moved))
        scores = fisher.remaining.scatter(procedure.score(stage).to(stage.weights.device))
        masks = procedure.select(stage, scores)
        moves = stage if adds_up else Stage(step, whole, index, step.masks, step.flat)
        moved, newton = _moved(moves, masks, procedure)
    return Pruned(step, fisher, masks, scores, moved, newton)


def _moved(
    stage: Stage, masks: Masks, procedure: Procedure
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The weights after compensation, and the gradient step."""
    remaining, weights = stage.fisher.remaining, stage.weights
    keep = remaining.gather(masks)
    if procedure.update == "none":
        return remaining.scatter(torch.where(keep, weights, 0.0)), None
    update = stage.fisher.directions(
        weights,
        keep,
        single=procedure.update == "single",
        descent=procedure.descends,
        continues=stage.step.is_large and stage.index < stage.step.stages[-1],
    )
    moved = update.compensation.to(weights.device, weights.dtype, copy=True).add_(weights)
    newton = remaining.scatter(update.newton.to(weights)) if procedure.descends else None
    return remaining.scatter(moved), newton
