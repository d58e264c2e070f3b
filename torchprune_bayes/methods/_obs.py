"""Optimal brain surgeon pruning with the empirical Fisher, in one step or in several.

Shared by all methods that know ``F⁻¹``. Each step takes gradients at the current
weights, scores the live entries, selects, and moves the survivors. Legend: ``w`` weights, ``F``
damped Fisher, ``ḡ`` mean gradient, ``u = F⁻¹ḡ``, ``η`` gradient step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_fraction, check_positive
from torchprune_bayes._numerics.fisher_blocks import InverseFisher, invert
from torchprune_bayes._numerics.obs import (
    Directions,
    joint_directions,
    single_directions,
    whole_gram_helps,
)
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.costs import flops_per_weight
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.methods._candidates import (
    Candidate,
    Stage,
    Step,
    best_of,
    climbed,
    walk_from,
    walked,
)
from torchprune_bayes.methods._curvature_holder import CurvatureHolder
from torchprune_bayes.methods._grouped_fisher import GroupedFisher
from torchprune_bayes.methods._obs_checks import (
    check_fitted_to,
    check_goes_with_pattern,
    check_steps,
    check_targets,
)
from torchprune_bayes.methods._pattern import Pattern
from torchprune_bayes.methods._target import Target
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision, Masks, Scores

logger = logging.getLogger("torchprune_bayes")

UPDATES = ("none", "single", "joint")
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # in units of the mean squared gradient
_DAMPING_FACTOR = 3.0  # of a walk from one step to the next
_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
_STAGES = 4
_PAPER_EPSILON = 1e-10

Select = Callable[[Stage, Target, Scores], Masks]


class ObsPruning(CurvatureHolder[EmpiricalFisher]):
    """Options and procedure of the OBS methods; :class:`WoodFisher` documents the options."""

    _score_dtype: ClassVar[torch.dtype | None] = None
    """Of the scores that are kept; ``None`` for that of the weights."""

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None = None,
        *,
        calibration: Calibration | None = None,
        curvature: EmpiricalFisher | None = None,
        block_size: int | str = "auto",
        damping: float | str = "auto",
        update: str = "joint",
        update_scale: float | str = "auto",
        steps: int = 1,
        stages: int | str = "auto",
        path: str = "cubic",
        scope: str = "global",
        across_tensors: bool = False,
        active_only: bool = True,
        centred: bool = False,
        flops_power: float = 0.0,
        flops_target: float | None = None,
        pattern: str | None = None,
        compat: str | None = None,
    ) -> None:
        self.pattern = None if pattern is None else Pattern.parse(pattern)
        if self.pattern is not None:
            check_goes_with_pattern(curvature, flops_power, flops_target, compat)
            amount = self.pattern.amount(amount)
        check_targets(amount, flops_target, scope)
        amount = 0.0 if amount is None else amount
        super().__init__(amount, calibration=calibration, curvature=curvature, scope=scope)
        check_steps(steps, stages, path, curvature)
        check_choice("update", update, UPDATES)
        check_choice("compat", compat, (None, "paper"))
        if damping != "auto":
            check_positive("damping", damping)
        if update_scale != "auto":
            check_fraction("update_scale", update_scale)
        self.damping, self.update, self.update_scale = damping, update, update_scale
        staged = steps == 1 and update == "joint"
        self.steps, self.path, self.compat = steps, path, compat
        self.stages = int(stages) if stages != "auto" else _STAGES if staged else 1
        self._screens = self.stages > 1
        self.flops_power, self.flops_target = flops_power, flops_target
        self._fisher_options: dict[str, Any] = {
            "block_size": block_size,
            "across_tensors": across_tensors,
            "active_only": active_only,
            "centred": centred,
        }
        EmpiricalFisher(**self._fisher_options)  # checks them

    def decide(self, space: ParameterSpace) -> Decision:
        """Choose masks and new weights of the survivors; the model is not changed.

        Args:
            space: The calibration's parameters.

        Raises:
            CalibrationError: If the data gave no usable gradients.
            NumericalError: If a factorisation failed.
        """
        weights, masks = space.values(), space.masks()
        target = self._target(masks)
        reports: list[dict[str, Any]] = []
        for index in range(self.steps):
            step = self._step(index, weights, masks, reports[-1] if reports else {})
            best = self._best_candidate(step, target)
            weights, masks = best.weights, best.masks
            reports.append(best.report())
            if self.steps > 1 and self.damping == "auto":
                reports[-1]["mean_square"] = step.damping_unit
            logger.info("%s step %d: %s", type(self).__name__, index + 1, reports[-1])
        moved = self.update != "none" or any(report["gradient_step"] for report in reports)
        info = {"steps": reports, "gradients": step.fisher.count, "engine": self._engine()}
        return Decision(masks, weights if moved else None, best.scores, info)

    def gradient_steps(self) -> tuple[float, ...]:
        """Values of ``η`` to choose from; the zeroth-order methods have no gradient term."""
        return (0.0,)

    def scores(self, inverse: InverseFisher, weights: Tensor, alive: Tensor) -> Tensor:
        """Rise of the loss for pruning each weight alone, or in the pattern, ``[blocks, B]``.

        ``w²/(2F⁻¹_ii)``, or ``½ w_gᵀ(F⁻¹_gg)⁻¹w_g`` for groups.
        """
        if self.pattern is not None:
            return self.pattern.scores(inverse, weights, alive)
        diagonal = inverse.inverse_diagonal()
        if self.compat == "paper":
            return weights.square() / (diagonal + _PAPER_EPSILON) + _PAPER_EPSILON
        return weights.square() / (2.0 * diagonal)

    def select(self, stage: Stage, target: Target, scores: Scores) -> Masks:
        """Masks at the end of a stage: what the smallest scores leave."""
        return _smallest(stage, target, scores)

    def _step(
        self, index: int, weights: dict[str, Tensor], masks: Masks, last: Mapping[str, Any]
    ) -> Step:
        if self.curvature is not None:
            check_fitted_to(self.curvature, masks)
            return Step(index, self.calibration, self.curvature, weights, masks, last)
        calibration = self.required_calibration.fresh(index)
        fisher = self._fisher().fit(calibration, weights, masks)
        return Step(index, calibration, fisher, weights, masks, last)

    def _fisher(self) -> EmpiricalFisher:
        if self.pattern is None:
            return EmpiricalFisher(**self._fisher_options)
        dims = self.pattern.dims(self.space)
        return GroupedFisher(dims, self.pattern.size, **self._fisher_options)

    def _target(self, masks: Masks) -> Target:
        options: dict[str, Any] = {"scope": self.scope, "path": self.path}
        steps = self.steps * self.stages
        if self.pattern is not None:
            dims = self.pattern.dims(self.space)
            return self.pattern.target(masks, dims, self.amount, steps=steps, **options)
        needs_costs = self.flops_power or self.flops_target is not None
        return Target(
            masks,
            self.amount,
            steps=steps,
            costs=flops_per_weight(self.required_calibration) if needs_costs else None,
            flops_target=self.flops_target,
            strict=self.compat == "paper",
            **options,
        )

    def _best_candidate(self, step: Step, target: Target) -> Candidate:
        if self.damping == "auto" and step.last:
            return self._walked(step, target)
        dampings = self._dampings(step)
        choices = []
        for cut in self._partitions(step):
            screened = self._screens and len(dampings) > 1
            kept = [self._screened(cut, target, dampings)] if screened else dampings
            choices += [(cut, damping) for damping in kept]
        tried = (self._candidate(s, target, d, self.stages, self.select) for s, d in choices)
        return best_of(tried, self.calibration)

    def _walked(self, step: Step, target: Target) -> Candidate:
        """The best damping near the last one, in units of the mean squared gradient.

        Up and down in turn, and on as long as the loss falls: the weights that are left late need
        far more damping than the network as a whole, and a grid at every step would cost more.
        """
        (cut,) = self._partitions(step)
        unit = step.damping_unit
        walk = walk_from(
            step.last["damping"] / step.last["mean_square"] * unit,
            _DAMPING_FACTOR if step.index % 2 else 1.0 / _DAMPING_FACTOR,
            (unit * _DAMPINGS[0], unit * _DAMPINGS[-1]),
        )
        return walked(
            lambda damping: self._candidate(cut, target, damping, self.stages, self.select),
            walk,
            self.required_calibration,
        )

    def _screened(self, step: Step, target: Target, dampings: list[float]) -> float:
        """The best damping without stages and searches, whose cost it would multiply."""
        tried = (self._candidate(step, target, d, 1, _smallest) for d in dampings)
        return best_of(tried, self.calibration).damping

    def _partitions(self, step: Step) -> list[Step]:
        """The step with the blocks to choose from.

        One block over the whole network uses all interactions, and is best where gradients are
        many; where they are few, smaller blocks do not fit their noise.
        """
        fisher = step.fisher
        if fisher.block_size != "auto" or not fisher.kept_in_memory or step.calibration is None:
            return [step]
        blocks: list[Any] = ["full", 2 * fisher.count]
        if step.last:
            blocks = [step.last["block_size"]]
        return [replace(step, fisher=fisher.with_blocks(size)) for size in blocks]

    def _dampings(self, step: Step) -> list[float]:
        if self.damping != "auto":
            return [float(self.damping)]
        if step.calibration is None:
            return [step.fisher.damping]
        return [step.damping_unit * factor for factor in _DAMPINGS]

    def _candidate(
        self, step: Step, target: Target, damping: float, stages: int, select: Select
    ) -> Candidate:
        live = step.fisher.live
        flat = live.gather(step.weights)
        kept, moved = step.masks, flat
        for stage in range(stages):
            # Scores are those of what is left, moved as far as it has been; the update is always
            # taken anew from the weights that the gradients belong to.
            left = step.fisher.restricted(kept, damping)
            scores = self._ranked(left, live.scatter(moved), kept, target)
            index = (step.index + 1) * self.stages - stages + stage
            kept = select(Stage(step, damping, index, kept), target, scores)
            keep = live.gather(kept)
            directions = self._directions(step.fisher, damping, flat, keep)
            moved = torch.where(keep, flat + directions.compensation, 0.0)

        def moved_by(scale: float, eta: float) -> Candidate:
            moved = flat + scale * directions.compensation + eta * directions.newton
            weights = live.scatter(torch.where(keep, moved, 0.0))
            return Candidate(kept, weights, scores, step.fisher.block_size, damping, scale, eta)

        axes = self._scales(), self.gradient_steps()
        scale = step.last.get("scale", axes[0][-1])
        eta = step.last.get("gradient_step", axes[1][0])
        # Not the step's own draw: with other held-out samples at each step choices waver.
        return climbed(moved_by, axes, (scale, eta), self.calibration)

    def _ranked(
        self, fisher: EmpiricalFisher, weights: dict[str, Tensor], masks: Masks, target: Target
    ) -> Scores:
        flat, alive = fisher.live.gather(weights), fisher.live.gather(masks)
        parts = []
        for where, inverse in fisher.inverses():
            w, a = (v[where].unflatten(0, inverse.shape) for v in (flat, alive))
            found = self.scores(inverse, w.double(), a)
            parts.append(found.to(self._score_dtype or flat.dtype).flatten())
        scores = fisher.live.scatter(torch.cat(parts))
        if target.costs is None or not self.flops_power:
            return scores
        costs = {name: cost**self.flops_power for name, cost in target.costs.items()}
        return {name: score / costs[name] for name, score in scores.items()}

    def _directions(
        self, fisher: EmpiricalFisher, damping: float, flat: Tensor, keep: Tensor
    ) -> Directions:
        if self._scales() == (0.0,) and self.gradient_steps() == (0.0,):
            return Directions(torch.zeros_like(flat), torch.zeros_like(flat))
        parts = []
        for where, gradients in fisher.sweep():
            shape = gradients.shape[::2]
            w, k = flat[where].unflatten(0, shape), keep[where].unflatten(0, shape)
            needed = self.update == "single" or whole_gram_helps(gradients, k)
            inner = fisher.inner(where, gradients) if needed else None
            if self.update == "single":
                found = single_directions(invert(gradients, damping, inner), w, k)
            else:
                found = joint_directions(gradients, damping, w, k, inner)
            parts.append([part.flatten().to(flat.dtype) for part in found])
        return Directions(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _scales(self) -> tuple[float, ...]:
        if self.update == "none":
            return (0.0,)
        return _SCALES if isinstance(self.update_scale, str) else (float(self.update_scale),)

    def _engine(self) -> str | None:
        return None if self.calibration is None else self.calibration.engine


def _smallest(stage: Stage, target: Target, scores: Scores) -> Masks:
    return target.keep(stage.index, scores, stage.masks)
