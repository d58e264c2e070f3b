"""The cut of a model with the values of a repair, if these lower the loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torchprune_bayes.calibration import Calibration, MeanLoss
from torchprune_bayes.structured._replacement import Change
from torchprune_bayes.structured._space import space_of
from torchprune_bayes.structured._walk import LayerRepair
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.repair import Repair
from torchprune_bayes.structured.slicing import ShrinkPlan, apply_plan, first_names

logger = logging.getLogger("torchprune_bayes")

_SPARSE = 0.05
"""Of the weights of a layer: fewer zeros do not make it sparse."""


@dataclass(frozen=True)
class RepairReport:
    """Effect of a repair on the loss.

    Attributes:
        layers: The layers that were fitted, in the order of the forward pass.
        skipped: Layers that were cut without a fit.
        loss_cut: Mean loss of the shrunk model without the repair.
        loss_repaired: Mean loss with it.
        samples: Held-out samples for these losses.
        in_sample: Whether there were none, so that they are those of the fit.
        seconds: Duration of the fits.
    """

    layers: tuple[LayerRepair, ...]
    skipped: tuple[str, ...]
    loss_cut: float
    loss_repaired: float
    samples: int
    in_sample: bool
    seconds: float

    @property
    def taken(self) -> bool:
        """Whether the model has the repaired weights; not if its loss is higher with them."""
        cut = self.loss_cut if self.loss_cut == self.loss_cut else float("inf")
        return bool(self.layers) and self.loss_repaired <= cut

    def __str__(self) -> str:
        if not self.layers:
            return f"not repaired, since no layer could be fitted anew: loss {self.loss_cut:.4g}"
        losses = (
            f"loss {self.loss_cut:.4g} when cut, {self.loss_repaired:.4g} when "
            f"{len(self.layers)} layers were fitted anew in {self.seconds:.1f} s, on "
            f"{self.samples:,} {'samples of the fits' if self.in_sample else 'held-out samples'}"
        )
        if self.taken:
            return f"repaired: {losses}"
        return f"left as it was cut, since the repair does not lower the loss: {losses}"


def cut_with(
    calibration: Calibration, groups: Sequence[UnitGroup], plan: ShrinkPlan, found: Repair
) -> tuple[Change, RepairReport]:
    """Cut a model, with the values of a repair if the loss is no higher with them.

    If these fill zeros of pruned layers, a warning says so.

    Args:
        calibration: Its model is cut.
        groups: The groups before the cut.
        plan: What stays.
        found: The repair for this plan.

    Returns:
        The cut, which is done, and the losses.
    """
    filled = _filled(calibration.model, plan, found.values)
    change = apply_plan(calibration.model, plan)
    try:
        loss_cut = _held_out(calibration, groups)
        change.undo()
        change, plain = apply_plan(calibration.model, plan, values=found.values), change
        loss_repaired = _held_out(calibration, groups)
    except BaseException:
        change.undo()
        raise
    report = RepairReport(
        found.layers,
        found.skipped,
        loss_cut.value,
        loss_repaired.value,
        loss_repaired.samples,
        loss_repaired.in_sample,
        found.seconds,
    )
    if not report.taken:
        change.undo()
        plain.redo()
        change = plain
        if report.layers:
            logger.warning("The model is %s. Calibrate on more samples.", report)
    elif filled:
        logger.warning(
            "The repair gives values to weights that were zero before it, %s: to keep a layer "
            "sparse, prune it after shrinking, or pass repair='none'.",
            ", ".join(f"{count:,} of `{name}`" for name, count in filled.items()),
        )
    return change, report


def _filled(model: nn.Module, plan: ShrinkPlan, values: Mapping[str, Tensor]) -> dict[str, int]:
    """Weights that stay and were zero, where a layer has more than a few, but are no more."""
    result = {}
    _, tensors = first_names(model)
    for name, value in values.items():
        old = tensors[name].detach()
        if old.dim() < 2 or name not in plan.kept:
            continue
        zero = plan.cut(name, old) == 0
        if _SPARSE <= float(zero.float().mean()) < 1.0:
            result[name] = int((zero & (plan.cut(name, value) != 0)).sum())
    return {name: count for name, count in result.items() if count}


def _held_out(calibration: Calibration, groups: Sequence[UnitGroup]) -> MeanLoss:
    pieces = [piece for group in groups for piece in group.slices if piece.role != "norm"]
    space, _ = space_of(calibration.model, pieces)
    return calibration.with_space(space).held_out_loss()
