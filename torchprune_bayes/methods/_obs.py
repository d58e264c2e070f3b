"""Optimal brain surgeon pruning with the empirical Fisher, in one step or in several.

Shared by :class:`WoodFisher` and :class:`WoodTaylor`. Each step takes gradients at the current
weights, scores the live entries, selects, and moves the survivors. Legend: ``w`` weights, ``F``
damped Fisher, ``ḡ`` mean gradient, ``u = F⁻¹ḡ``, ``η`` gradient step.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_count, check_fraction, check_positive
from torchprune_bayes._numerics.fisher_blocks import InverseFisher, invert
from torchprune_bayes._numerics.obs import Directions, joint_directions, single_directions
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.costs import flops_per_weight
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision, Masks, Scores

logger = logging.getLogger("torchprune_bayes")

UPDATES = ("none", "single", "joint")
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)  # in units of the mean squared gradient
_DAMPING_CHANGES = ((1.0, 3.0), (0.3, 1.0))  # from one step to the next
_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
_STAGES = 4
_PAPER_EPSILON = 1e-10


@dataclass(frozen=True)
class Candidate:
    """One way to take a step; its loss is measured only where there is a choice."""

    masks: Masks
    weights: dict[str, Tensor]
    scores: Scores
    block_size: int | str
    damping: float
    scale: float
    gradient_step: float
    loss: float | None = None
    in_sample: bool | None = None

    def report(self) -> dict[str, Any]:
        """The plain numbers of the step."""
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        total = sum(mask.numel() for mask in self.masks.values())
        numbers = ("block_size", "damping", "scale", "gradient_step", "loss", "in_sample")
        return {"sparsity": 1.0 - kept / total} | {name: getattr(self, name) for name in numbers}


class ObsPruning(PruningMethod):
    """Options and procedure of the OBS methods; :class:`WoodFisher` documents the options."""

    def __init__(
        self,
        amount: float | int | None,
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
        compat: str | None = None,
    ) -> None:
        _check_targets(amount, flops_target, scope)
        super().__init__(0.0 if amount is None else amount, calibration=calibration, scope=scope)
        check_count("steps", steps)
        if stages != "auto":
            check_count("stages", stages)
        check_choice("update", update, UPDATES)
        check_choice("path", path, ("cubic", "geometric", "linear"))
        check_choice("compat", compat, (None, "paper"))
        if damping != "auto":
            check_positive("damping", damping)
        if update_scale != "auto":
            check_fraction("update_scale", update_scale)
        if curvature is not None and steps > 1:
            raise ArgumentError(
                f"Expected `calibration=` alone for steps={steps}, because every step takes fresh "
                "gradients, got a fitted curvature."
            )
        self.curvature = curvature
        if calibration is None and curvature is not None:
            self.calibration = curvature.calibration
        self.damping, self.update, self.update_scale = damping, update, update_scale
        staged = steps == 1 and update == "joint"
        self.steps, self.path, self.compat = steps, path, compat
        self.stages = int(stages) if stages != "auto" else _STAGES if staged else 1
        self._screens = self.stages > 1
        self.flops_power, self.flops_target = flops_power, flops_target
        self._fisher = EmpiricalFisher(
            block_size=block_size,
            across_tensors=across_tensors,
            active_only=active_only,
            centred=centred,
        )

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
            step = self._step(index, weights, masks)
            best = self._best_candidate(step, target, reports)
            weights, masks = best.weights, best.masks
            reports.append(best.report())
            logger.info("%s step %d: %s", type(self).__name__, index + 1, reports[-1])
        moved = self.update != "none" or any(report["gradient_step"] for report in reports)
        info = {"steps": reports, "gradients": step.fisher.count, "engine": self._engine()}
        return Decision(masks, weights if moved else None, best.scores, info)

    def release(self) -> None:
        """Let go of model, data and curvature."""
        super().release()
        self.curvature = None

    def gradient_steps(self) -> tuple[float, ...]:
        """Values of ``η`` to choose from; the zeroth-order methods have no gradient term."""
        return (0.0,)

    def scores(self, inverse: InverseFisher, weights: Tensor) -> Tensor:
        """Rise of the loss for pruning each weight alone, ``w²/(2F⁻¹_ii)``, ``[blocks, B]``."""
        diagonal = inverse.inverse_diagonal()
        if self.compat == "paper":
            return weights.square() / (diagonal + _PAPER_EPSILON) + _PAPER_EPSILON
        return weights.square() / (2.0 * diagonal)

    def _step(self, index: int, weights: dict[str, Tensor], masks: Masks) -> _Step:
        if self.curvature is not None:
            _check_fitted_to(self.curvature, masks)
            return _Step(index, self.calibration, self.curvature, weights, masks)
        calibration = self.required_calibration.fresh(index)
        fisher = copy.copy(self._fisher).fit(calibration, weights, masks)
        return _Step(index, calibration, fisher, weights, masks)

    def _target(self, masks: Masks) -> Target:
        needs_costs = self.flops_power or self.flops_target is not None
        return Target(
            masks,
            self.amount,
            scope=self.scope,
            steps=self.steps * self.stages,
            path=self.path,
            costs=flops_per_weight(self.required_calibration) if needs_costs else None,
            flops_target=self.flops_target,
            strict=self.compat == "paper",
        )

    def _best_candidate(
        self, step: _Step, target: Target, reports: list[dict[str, Any]]
    ) -> Candidate:
        dampings = self._dampings(step, reports)
        choices = []
        for cut in self._partitions(step, reports):
            screened = self._screens and len(dampings) > 1
            kept = [self._screened(cut, target, dampings)] if screened else dampings
            choices += [(cut, damping) for damping in kept]
        staged = (c for s, d in choices for c in self._candidates(s, target, d, self.stages))
        return _best(staged, step.calibration)

    def _screened(self, step: _Step, target: Target, dampings: list[float]) -> float:
        """The best damping without stages: a stage more costs as much as a damping more."""
        tried = (c for d in dampings for c in self._candidates(step, target, d, stages=1))
        return _best(tried, step.calibration).damping

    def _partitions(self, step: _Step, reports: list[dict[str, Any]]) -> list[_Step]:
        """The step with the blocks to choose from.

        One block over the whole network uses all interactions, and is best where gradients are
        many; where they are few, smaller blocks do not fit their noise.
        """
        fisher = step.fisher
        if fisher.block_size != "auto" or not fisher.kept_in_memory or step.calibration is None:
            return [step]
        blocks: list[Any] = ["full", 2 * fisher.count]
        if reports:
            blocks = [reports[-1]["block_size"]]
        return [replace(step, fisher=fisher.with_blocks(size)) for size in blocks]

    def _dampings(self, step: _Step, reports: list[dict[str, Any]]) -> list[float]:
        if self.damping != "auto":
            return [float(self.damping)]
        if step.calibration is None:
            return [step.fisher.damping]
        if reports:
            # Up and down in turn: the third candidate of every step would cost a third of the time.
            changes = _DAMPING_CHANGES[len(reports) % 2]
            return [reports[-1]["damping"] * factor for factor in changes]
        unit = step.fisher.mean_square() or 1.0
        return [unit * factor for factor in _DAMPINGS]

    def _candidates(
        self, step: _Step, target: Target, damping: float, stages: int
    ) -> Iterator[Candidate]:
        live = step.fisher.live
        flat = live.gather(step.weights)
        kept, moved = step.masks, flat
        for stage in range(stages):
            # Scores are those of what is left, moved as far as it has been; the update is always
            # taken anew from the weights that the gradients belong to.
            scores = self._ranked(
                step.fisher.restricted(kept, damping), live.scatter(moved), target
            )
            index = (step.index + 1) * self.stages - stages + stage
            kept = target.keep(index, scores, kept)
            keep = live.gather(kept)
            directions = self._directions(step.fisher, damping, flat, keep)
            moved = torch.where(keep, flat + directions.compensation, 0.0)
        for scale, eta in product(self._scales(), self.gradient_steps()):
            moved = flat + scale * directions.compensation + eta * directions.newton
            weights = live.scatter(torch.where(keep, moved, 0.0))
            yield Candidate(kept, weights, scores, step.fisher.block_size, damping, scale, eta)

    def _ranked(
        self, fisher: EmpiricalFisher, weights: dict[str, Tensor], target: Target
    ) -> Scores:
        flat = fisher.live.gather(weights)
        parts = [
            self.scores(inverse, flat[where].double().unflatten(0, inverse.shape)).to(flat.dtype)
            for where, inverse in fisher.inverses()
        ]
        scores = fisher.live.scatter(torch.cat([part.flatten() for part in parts]))
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
            inner = fisher.inner(where, gradients)
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


@dataclass(frozen=True)
class _Step:
    index: int
    calibration: Calibration | None
    fisher: EmpiricalFisher
    weights: dict[str, Tensor]
    masks: Masks


def _best(candidates: Iterator[Candidate], calibration: Calibration | None) -> Candidate:
    best = next(candidates)
    for candidate in candidates:
        if calibration is None:
            raise ArgumentError(
                "Expected numbers for `damping` and `update_scale` with a curvature alone: "
                "choosing them needs `calibration=`."
            )
        if best.loss is None:
            best = _measured(best, calibration)
        candidate = _measured(candidate, calibration)
        best = min(best, candidate, key=_loss)
    return best


def _measured(candidate: Candidate, calibration: Calibration) -> Candidate:
    found = calibration.held_out_loss(candidate.weights)
    return replace(candidate, loss=found.value, in_sample=found.in_sample)


def _loss(candidate: Candidate) -> float:
    # A loss that is not a number loses against any number.
    loss = candidate.loss
    return math.inf if loss is None or math.isnan(loss) else loss


def _check_fitted_to(curvature: EmpiricalFisher, masks: Masks) -> None:
    live = curvature.live.masks
    fits = list(live) == list(masks) and all(
        not curvature.active_only or torch.equal(live[name].to(mask.device), mask)
        for name, mask in masks.items()
    )
    if not fits:
        raise AlignmentError(
            "Expected a curvature fitted to the entries that are alive now, got one of other "
            "tensors or of an earlier mask: fit it again."
        )


def _check_targets(amount: float | int | None, flops_target: float | None, scope: str) -> None:
    if (amount is None) == (flops_target is None):
        raise ArgumentError(
            "Expected either `amount` or `flops_target` (then amount=None), "
            f"got amount={amount!r} and flops_target={flops_target!r}."
        )
    if flops_target is not None:
        check_fraction("flops_target", flops_target)
        check_choice("scope with flops_target", scope, ("global",))
