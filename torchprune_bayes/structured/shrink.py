"""Shrinking a model in place: score, choose, cut, check."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from warnings import warn

from torch import nn
from torch.optim import Optimizer

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.structured._recipe import Recipe, Repairing
from torchprune_bayes.structured._replacement import as_it_was_on_error
from torchprune_bayes.structured._report import Amount, GroupChange, ShrinkReport
from torchprune_bayes.structured._shrinking import Shrinking, Target
from torchprune_bayes.structured._steps import sparsities
from torchprune_bayes.structured.allocation import Allocation
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.head_dimensions import arranged
from torchprune_bayes.structured.measured_costs import MeasuredCosts
from torchprune_bayes.structured.optimizer_state import slice_ema, slice_optimizer
from torchprune_bayes.structured.slicing import ShrinkPlan
from torchprune_bayes.structured.support import plain_model, units_to_remove
from torchprune_bayes.structured.tracing import Heads
from torchprune_bayes.structured.unit_costs import UnitCosts
from torchprune_bayes.wiring.forward import ForwardFunction

if TYPE_CHECKING:
    from torchprune_bayes.structured.importance import UnitImportance

logger = logging.getLogger("torchprune_bayes")

_TOLERANCE, _SPREAD = 0.05, 0.1
"""How far a latency may miss what was asked for, and its quartiles differ, without a warning."""


def shrink(
    model: nn.Module,
    example_inputs: Any,
    importance: Calibration | UnitImportance | Any,
    *,
    sparsity: float | None = None,
    target: Target = "params",
    steps: int | Sequence[float] = 1,
    calibration: Calibration | None = None,
    allocation: Allocation | None = None,
    repair: Repairing = "auto",
    evaluations: int = 60,
    min_keep: int = 1,
    round_to: int = 1,
    ignored: Collection[nn.Module | str] = (),
    groups: Sequence[UnitGroup] | None = None,
    optimizer: Optimizer | None = None,
    ema: nn.Module | Iterable[nn.Module] = (),
    forward_fn: ForwardFunction | None = None,
    verify: bool = True,
    heads: Heads | None = None,
    scope: Literal["global", "layer"] | None = None,
) -> ShrinkReport:
    """Remove the least important channels, hidden units or heads of a model.

    With a calibration instead of an importance, the recommended way, units are scored by
    :class:`~torchprune_bayes.structured.ConsumerGateFisherImportance`, allocated to groups by
    measured loss curves, and compensated by least squares.

    Units are removed in order until the sparsity is just reached: with one unit (or one block of
    ``round_to``) of any group put back, the sparsity would not be reached. Then the shrunk model is
    compared with the whole one in which the same units are zeroed. If this or anything else fails,
    the model is restored.

    Args:
        model: The model; changed in place. ``DataParallel`` and ``torch.compile`` are
            unwrapped. Cut parameters are new objects, so pass the optimizer, or build it
            afterwards.
        example_inputs: A tensor, a tuple of positional or a mapping of keyword arguments; ``None``
            for a model of a known family, without FLOPs and verification.
        importance: A calibration, an importance of this library, or one of torch-pruning's.
        sparsity: Fraction of the whole, in [0, 1), to remove.
        target: What the sparsity counts: ``"params"`` or ``"flops"`` of the whole model, with the
            classifier and all else that cannot be removed; ``"channels"``, that is, units of all
            groups that are not ignored; or ``"latency"`` or ``"memory"`` of a forward pass on the
            example inputs, measured on this machine, see
            :class:`~torchprune_bayes.structured.MeasuredCosts` for how exactly.
            ``"evidence"`` takes no sparsity and removes all units
            that score below ``importance.threshold``.
        steps: Number of equal steps, each with new scores, curves and repair, or the sparsities
            after each step. Every step costs what one costs. With a calibration instead of an
            importance three steps were better than one on a small ViT.
        calibration: Data, model and loss for curves and repair; by default those of the importance,
            where it has some.
        allocation: How units of different groups are compared. ``"global"``: their scores,
            divided by what a unit costs in the target's resource where a score speaks for the unit
            as a whole (``importance.joint``). ``"measured"``: the slopes of loss curves, measured
            for one group after the other and made convex, divided by the cost, see
            :func:`~torchprune_bayes.structured.curves.measure_curves`. ``"layer"``: all groups lose
            the same fraction of their units. ``"isomorphic"``: so do all classes of groups with
            the same wiring. The default is ``"measured"`` with a calibration instead of an
            importance, otherwise ``"global"``.
        repair: ``"least_squares"`` re-fits all layers that read removed units on the remaining
            ones, and recomputes statistics of batch norms, see
            :func:`~torchprune_bayes.structured.repair`; the weights are left unfitted if the loss
            on held-out samples is higher after it. ``"auto"`` does so if there is a calibration and
            the importance moves no weights itself; ``"none"`` does not.
        evaluations: Total points of all measured curves, each one evaluation of the loss.
        min_keep: Units that every group keeps.
        round_to: Multiple for the number of units left in a group that loses some.
        ignored: Modules, names of modules, or names of groups to leave whole.
        groups: The groups, if they are known; otherwise :func:`find_groups` finds them.
        optimizer: Follows: its parameters are exchanged and its state is cut.
        ema: Averaged copies of the model, cut in the same way; they are not repaired.
        forward_fn: ``forward_fn(model, example_inputs) -> output`` for other ways to call it.
        verify: Whether to compare with the masked model.
        heads: ``"whole"`` removes heads of attention as a whole; ``"dimensions"`` keeps all heads
            and removes dimensions inside of them, equally many in all heads of a layer, but from
            each head its least important ones. Queries and keys are chosen separately from values.
            Heads that do not allow this, such as those with rotary embeddings, are kept whole and
            named in ``left_out``; ``"either"`` removes whole heads there. Products keep their
            scale: queries and keys are multiplied by ``(d'/d)^¼`` where a module divides by the
            square root of the remaining ``d``. The default is ``"either"`` for ``target="flops"``
            with a calibration instead of an importance, otherwise ``"whole"``: per FLOP dimensions
            lose less, and whole heads save a little more time.
        scope: The former name of ``allocation``, deprecated.

    Returns:
        Sizes before and after, the plan, and the difference from the masked model.

    Raises:
        ArgumentError: If an argument has an impossible value, or floors and ignored layers do not
            allow the sparsity.
        ArgumentTypeError: If an argument has the wrong type.
        AlignmentError: If the calibration is of another model.
        ParameterError: If the model is masked, sharded or distributed, or cannot be supported.
        NumericalError: If the shrunk model does not compute what the masked one computes.

    Cost: scoring, and about ten forward passes; measured curves take an evaluation of the loss for
    each point, and a repair about three. Old tensors are held until the end.

    Example:
        >>> import torch
        >>> from torchprune_bayes.structured import UnitImportance
        >>> class RowNorm(UnitImportance):
        ...     def score(self, group, model):
        ...         rows = model.get_parameter(group.slices[0].name).detach()
        ...         return rows[group.slices[0].positions[:, 0]].flatten(1).norm(dim=1)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = shrink(model, torch.randn(3, 4), RowNorm(), sparsity=0.5, target="channels")
        >>> model[0].out_features, model[2].in_features
        (4, 4)
        >>> print(report.parameters)
        58 -> 30 (-48.3%)
    """
    if scope is not None:
        warn("`scope` is now `allocation`, and goes in 0.3.", DeprecationWarning, stacklevel=2)
        allocation = allocation or scope
    inner, inputs = plain_model(model), (example_inputs, forward_fn)
    wanted = sparsities(sparsity, target, steps)
    recipe = Recipe.of(
        inner,
        importance,
        calibration,
        allocation,
        repair,
        evaluations=evaluations,
        min_keep=min_keep,
        round_to=round_to,
    )
    _check_threshold(recipe, target)
    if verify and example_inputs is None:
        raise ArgumentError(
            "Expected `example_inputs` to verify with, got None: pass some, or verify=False."
        )
    if heads is None:
        heads = "either" if target == "flops" and isinstance(importance, Calibration) else "whole"
    units = units_to_remove(inner, example_inputs, sparsity, ignored, groups, forward_fn, heads)
    result = arranged(inner, units.groups, recipe.importance)
    costs = UnitCosts.measure(inner, result, example_inputs, forward_fn, units.flops)
    run = Shrinking(inner, result, recipe, costs, _measured(inner, result, target, inputs))
    averages = [ema] if isinstance(ema, nn.Module) else list(ema)
    with as_it_was_on_error([inner, *averages], optimizer):
        for fraction in wanted:
            run.step(target, fraction)
        plan = run.whole_plan()
        difference = run.difference(plan, *inputs, units.operations) if verify else None
        counted = example_inputs is not None
        report = _report(run, target, sparsity, plan, difference, units.left_out, counted=counted)
        replaced = run.replaced()
        for copy in averages:
            slice_ema(copy, plan)
        if optimizer is not None:
            slice_optimizer(optimizer, plan, replaced)
        return report


def _check_threshold(recipe: Recipe, target: str) -> None:
    threshold = recipe.importance.threshold
    if target == "evidence" and (threshold is None or recipe.allocation != "global"):
        raise ArgumentError(
            "Expected an importance with a threshold and allocation='global' for "
            f"target='evidence', got threshold={threshold} and allocation={recipe.allocation!r}."
        )


def _measured(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    target: Target,
    inputs: tuple[Any, ForwardFunction | None],
) -> MeasuredCosts | None:
    if target != "latency" and target != "memory":
        return None
    if inputs[0] is None:
        raise ArgumentError(
            f"Expected `example_inputs` to measure {target} with, got None: pass inputs of the "
            "size that matters to you."
        )
    return MeasuredCosts(target, model, groups, *inputs)


def _report(
    run: Shrinking,
    target: Target,
    sparsity: float | None,
    plan: ShrinkPlan,
    difference: float | None,
    left_out: Mapping[str, str],
    *,
    counted: bool,
) -> ShrinkReport:
    left, costs = run.left(), run.costs
    measured, spread = _measured_amount(run, target, sparsity)
    return ShrinkReport(
        target=target,
        sparsity=sparsity,
        units=Amount(costs.count({}), costs.count(left)),
        parameters=Amount(costs.parameters({}), costs.parameters(left)),
        flops=Amount(costs.flops({}), costs.flops(left)) if counted else None,
        groups=[
            GroupChange(group.name, group.kind, Amount(group.units, left[group.name]))
            for group in run.original
        ],
        plan=plan,
        difference=difference,
        steps=run.steps,
        left_out=left_out,
        measured=measured,
        spread=spread,
        curves=run.curves,
        repairs=run.repairs,
    )


def _measured_amount(
    run: Shrinking, target: Target, sparsity: float | None
) -> tuple[Amount | None, float]:
    """What was measured before and after, and by how much the latter varies."""
    if run.measured is None or target == "evidence" or sparsity is None:
        return None, 0.0
    after = run.measured.anew(run.left())
    amount = Amount(round(run.measured.total(target, {})), round(after.value))
    if amount.sparsity < sparsity - _TOLERANCE or after.spread > _SPREAD:
        logger.warning(
            "Asked for a %s %.0f %% smaller, and measured anew it is %.0f %% smaller, half of the "
            "passes within %.0f %% of each other: measure on an idle machine, with larger inputs, "
            "and with torch.set_num_threads(1) if that is how the model will run.",
            target,
            100 * sparsity,
            100 * amount.sparsity,
            100 * after.spread,
        )
    return amount, after.spread
