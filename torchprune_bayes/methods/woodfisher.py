"""WoodFisher: second-order pruning with the inverse empirical Fisher.

The method in full: :meth:`WoodFisher.decide` is the algorithm, :meth:`WoodFisher.score` the paper's
equation. The Fisher is :class:`torchprune_bayes.curvature.EmpiricalFisher`, the update
:mod:`torchprune_bayes._numerics.obs`, and one step :mod:`torchprune_bayes.methods._obs_step`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice, check_fraction, check_positive
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.costs import flops_per_weight
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.curvature.group_layout import GroupLayout
from torchprune_bayes.methods._curvature_holder import CurvatureHolder
from torchprune_bayes.methods._obs_checks import (
    check_fitted_to,
    check_goes_with_pattern,
    check_steps,
    check_targets,
)
from torchprune_bayes.methods._obs_step import (
    Procedure,
    Stage,
    State,
    Step,
    Update,
    is_large,
    smallest,
)
from torchprune_bayes.methods._pattern import Pattern
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods._tuning import SCALES, Tuning, warn_of_a_rise
from torchprune_bayes.methods.paper_variant import PaperVariant
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision

logger = logging.getLogger("torchprune_bayes")

_STAGES, _STAGES_OF_LARGE = 4, 3
_MANY_GRADIENTS = 128
_PAPER_EPSILON = 1e-10


@register(
    "woodfisher",
    title="optimal brain surgeon with the empirical Fisher",
    paper="arXiv:2004.14340",
)
class WoodFisher(CurvatureHolder[EmpiricalFisher]):
    """Prune the weights whose removal raises a local quadratic model of the loss the least.

    `WoodFisher (Singh and Alistarh, 2020) <https://arxiv.org/abs/2004.14340>`_: with the damped
    empirical Fisher ``F = λI + (1/N) Σ g gᵀ`` instead of the Hessian, removing weight ``q``
    and moving the others optimally costs ``ρ_q = w_q²/(2F⁻¹_qq)``. The weights with the smallest
    ``ρ`` are pruned, and the others take the compensating update.

    The Fisher is inverted exactly in the space of the samples, so a block may be a layer or the
    whole network. Two things matter more than anything else. *Stages* re-score the remaining
    weights, with the same gradients, after each part of the pruning. *Steps* also take new
    gradients at the weights that the last step left: on MLPNet at 98 % sparsity, magnitude pruning
    is right on 32.3 % of the test images, one step with four stages on 58.0 %, sixteen steps on
    88.9 %.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune; ``None`` with
            ``flops_target``, and with an N:M pattern, which fixes it.
        calibration: Data, model and loss.
        curvature: An :class:`~torchprune_bayes.curvature.EmpiricalFisher` fitted already.
        block_size: Blocks of the Fisher: ``"full"``, ``"tensor"``, an int, or ``"auto"``: one
            block or small blocks (of ``2N`` entries; of fewer than 128 gradients ``4N``, between
            128 and 256), whichever has the smaller loss on held-out samples; beyond two million
            entries the small blocks.
        damping: ``λ``, or ``"auto"``: the value, in units of the mean squared gradient, whose
            update does best on gradients left out of it, and then on held-out samples
            (:mod:`torchprune_bayes.methods._tuning`).
        update: ``"none"`` only selects; ``"single"`` adds up the updates for removing each weight
            individually, as in the paper; ``"joint"`` solves for all of them jointly.
        update_scale: Share of the update to take, or ``"auto"``, a line search on held-out loss.
        steps: Steps, each with new gradients.
        stages: Parts of each step, or ``"auto"``: 4 for one step with the joint update, 3 beyond
            two million entries, otherwise 1.
        path: Sparsity over the steps, ``"cubic"``, ``"geometric"`` or ``"linear"``.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.
        flops_target: Share of the dense FLOPs of these tensors to keep.
        pattern: ``"2:4"`` keeps two of every four inputs of an output, any ``"N:M"`` likewise;
            ``"1x4"`` keeps or prunes four inputs of an output together, and ``amount`` is a
            fraction of such groups. Groups count from the first input of a linear layer, and from
            the first input channel at each place of a convolution's kernel; the number of inputs
            must be a multiple of their size. A group is scored by what its removal costs with the
            interactions within it, ``½ w_gᵀ(F⁻¹_gg)⁻¹w_g``.
        compat: Choices of the published code, for comparison with its numbers: ``"paper"`` for its
            threshold and epsilon, or a :class:`~torchprune_bayes.methods.PaperVariant`.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is neither calibration nor curvature.
        ParameterError: If the inputs of a tensor cannot be cut into the groups of the pattern.

    Cost per step: one pass over the data for ``N`` gradients of ``D`` entries; ``2N²D`` operations
    for the scores and as many for the update, in each stage, of small blocks for the scores of the
    first stage alone, a quarter of that where 128 gradients or more are halved for it; ``4ND``
    bytes, on the device, in memory or in a scratch file.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from torchprune_bayes import Calibration, WoodFisher, prunable_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> params = prunable_parameters(model)
        >>> calibration = Calibration(
        ...     model, data, torch.nn.functional.cross_entropy, params=params, num_samples=64
        ... )
        >>> prune.global_unstructured(
        ...     params, pruning_method=WoodFisher, amount=0.5, calibration=calibration
        ... )
        >>> sum(int((module.weight == 0).sum()) for module, _ in params)
        88
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None = None,
        *,
        calibration: Calibration | None = None,
        curvature: EmpiricalFisher | None = None,
        block_size: int | str = "auto",
        damping: float | Literal["auto"] = "auto",
        update: Update = "joint",
        update_scale: float | Literal["auto"] = "auto",
        steps: int = 1,
        stages: int | Literal["auto"] = "auto",
        path: str = "cubic",
        scope: str = "global",
        flops_target: float | None = None,
        pattern: str | None = None,
        compat: Literal["paper"] | PaperVariant | None = None,
    ) -> None:
        self.pattern = None if pattern is None else Pattern.parse(pattern)
        self.variant = PaperVariant.of(compat)
        if self.pattern is not None:
            check_goes_with_pattern(curvature, flops_target, self.variant)
            amount = self.pattern.amount(amount)
        check_targets(amount, flops_target, scope)
        amount = 0.0 if amount is None else amount
        super().__init__(amount, calibration=calibration, curvature=curvature, scope=scope)
        check_steps(steps, stages, path, curvature)
        check_choice("update", update, ("none", "single", "joint"))
        if damping != "auto":
            check_positive("damping", damping)
        if update_scale != "auto":
            check_fraction("update_scale", update_scale)
        self.damping, self.update, self.update_scale = damping, update, update_scale
        self.steps, self.path, self.flops_target = steps, path, flops_target
        self.stages = stages
        self.block_size = block_size
        self.procedure = Procedure(self.score, smallest, update)
        self.tuning = Tuning(damping, _scales(update, update_scale))
        self._new_fisher(None)  # checks its options

    def decide(self, space: ParameterSpace) -> Decision:
        """Choose masks and new values of the kept weights; the model is not changed.

        Args:
            space: The calibration's parameters.

        Raises:
            CalibrationError: If the data gave no usable gradients.
            NumericalError: If a factorisation failed.
        """
        state = start = State.of(space)
        each = self._stages_of(space)
        target = self._target(space, self.steps * each)
        for index in range(self.steps):
            fisher = self._fisher_at(state, index)  # F = λI + (1/N) Σ g gᵀ at the weights now
            stages = range(index * each, (index + 1) * each)
            step = Step(
                index,
                fisher,
                state.weights,
                state.masks,
                target,
                stages,
                state.last,
                self.calibration,
            )
            move = self.tuning.best(step, self.procedure)
            state = move.after(state)
            logger.info("%s step %d: %s", type(self).__name__, index + 1, state.last)
        warn_of_a_rise(start, state, self.calibration)
        moved = self.procedure.update != "none" or any(r.gradient_step for r in state.reports)
        engine = None if self.calibration is None else self.calibration.engine
        return state.decision(moved=moved, gradients=fisher.count, engine=engine)

    def score(self, stage: Stage) -> Tensor:
        """Rise of the loss for removing each weight and moving the others optimally, ``[D]``.

        ``ρ_q = w_q²/(2F⁻¹_qq)``, equation 6 of the paper; in a pattern of groups ``g``
        ``½ w_gᵀ(F⁻¹_gg)⁻¹w_g``.
        """
        weights = wide(stage.weights)
        if self.pattern is not None:
            scores = self.pattern.scores(stage.fisher, weights, stage.remaining)
        elif self.variant.threshold:
            diagonal = stage.fisher.inverse_diagonal()
            scores = weights.square() / (diagonal + _PAPER_EPSILON) + _PAPER_EPSILON
        else:
            scores = weights.square().div_(_to_score_by(stage).inverse_diagonal().mul_(2.0))
        return self._per_cost(stage, scores).to(stage.weights.dtype)

    def _per_cost(self, stage: Stage, scores: Tensor) -> Tensor:
        costs, power = stage.step.target.costs, self.variant.flops_power
        if costs is None or not power:
            return scores
        shapes = stage.fisher.remaining.masks
        each = {
            name: torch.full(mask.shape, costs[name] ** power, device=mask.device)
            for name, mask in shapes.items()
        }
        return scores / stage.fisher.remaining.gather(each).to(scores)

    def _fisher_at(self, state: State, index: int) -> EmpiricalFisher:
        if self.curvature is not None:
            check_fitted_to(self.curvature, state.masks)
            return self.curvature.to(next(iter(state.weights.values())).device)
        calibration = self.required_calibration.redrawn(index)
        layout = None
        if self.pattern is not None:
            layout = GroupLayout(self.pattern.dims(self.space), self.pattern.size)
        return self._new_fisher(layout).fit(calibration, state.weights, state.masks)

    def _new_fisher(self, layout: GroupLayout | None) -> EmpiricalFisher:
        return EmpiricalFisher(
            block_size=self.block_size,
            across_tensors=self.variant.across_tensors,
            active_only=self.variant.active_only,
            centred=self.variant.centred,
            layout=layout,
        )

    def _stages_of(self, space: ParameterSpace) -> int:
        if isinstance(self.stages, int):
            return self.stages
        if self.steps > 1 or self.update != "joint":
            return 1
        large = is_large(RemainingVector(space.masks()).numel)
        return _STAGES_OF_LARGE if large else _STAGES

    def _target(self, space: ParameterSpace, steps: int) -> Target:
        masks = space.masks()
        if self.pattern is not None:
            dims = self.pattern.dims(self.space)
            return self.pattern.target(
                masks, dims, self.amount, steps=steps, scope=self.scope, path=self.path
            )
        needs_costs = self.variant.flops_power or self.flops_target is not None
        return Target(
            masks,
            self.amount,
            scope=self.scope,
            steps=steps,
            path=self.path,
            costs=flops_per_weight(self.required_calibration) if needs_costs else None,
            flops_target=self.flops_target,
            strict=self.variant.threshold,
        )


def _to_score_by(stage: Stage) -> EmpiricalFisher:
    """Its Fisher, or that of half of many gradients for the first stage of a large network.

    That prunes what is far from the threshold, and later stages score the rest by all gradients.
    """
    fisher, stages = stage.fisher, stage.step.stages
    opens = len(stages) > 1 and stage.index == stages[0]
    large = stage.step.is_large and len(fisher.blocks) > 1
    if opens and large and fisher.count >= _MANY_GRADIENTS:
        return fisher.of_every_second_gradient()
    return fisher


def _scales(update: Update, scale: float | Literal["auto"]) -> tuple[float, ...]:
    if update == "none":
        return (0.0,)
    return SCALES if isinstance(scale, str) else (float(scale),)
