"""CNIP-it: weights and units in one ranking."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_count, check_fraction
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.methods.sensitivity import mean_loss, sensitivities
from torchprune_bayes.params import ParameterSpace, unwrap
from torchprune_bayes.schedules import halving
from torchprune_bayes.structured._report import Amount, ShrinkReport
from torchprune_bayes.structured.importances.snapit import EPSILON, SNAPitImportance
from torchprune_bayes.structured.shrink import shrink
from torchprune_bayes.structured.tracing import find_groups
from torchprune_bayes.types import Masks


@dataclass(frozen=True)
class WeightsAndUnits:
    """What :func:`prune_weights_and_units` did.

    Attributes:
        masks: Masks of the weights that are left in the units that are left, by name; hand them to
            :func:`~torchprune_bayes.keep_sparse` with the optimizer.
        weights: Weights that are not zero, before and after.
        units: Units before and after.
        reports: What was cut, one report for each step that removed units.
    """

    masks: Masks
    weights: Amount
    units: Amount
    reports: tuple[ShrinkReport, ...]


def prune_weights_and_units(
    model: nn.Module,
    example_inputs: Any,
    calibration: Callable[[nn.Module], Calibration],
    sparsity: float,
    *,
    steps: int = 5,
    min_keep: int = 1,
) -> WeightsAndUnits:
    """Rank single weights and whole units by their elasticities together, and remove the lowest.

    CNIP-it of SNIP-it (`Verdenius, Stol and Forré, 2020 <https://arxiv.org/abs/2006.00896>`_). The
    elasticity ``|∂L/∂c · c/L|`` of the loss to a gate is that of a weight in
    :class:`~torchprune_bayes.SNIPit` and that of a unit in
    :class:`~torchprune_bayes.structured.SNAPitImportance`, so that one threshold serves both. At
    each step of the path as many of all weights and units as are due go: units are cut out, weights
    become zero. A weight that goes with its unit counts as gone.

    Args:
        model: The model, without masks; changed in place.
        example_inputs: See :func:`~torchprune_bayes.structured.shrink`.
        calibration: A function ``model -> calibration``, called at every step.
        sparsity: Fraction of all weights and units together that is to be gone.
        steps: How often what is missing is halved on the way, see
            :func:`~torchprune_bayes.schedules.halving`.
        min_keep: Units that every group keeps.

    Returns:
        Masks and counts.

    Raises:
        ArgumentError: If an argument is out of range.
        ParameterError: If the model cannot be shrunk.

    Cost: at each of ``steps + 2`` steps two gradients, and that of a shrinking.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> data = [(torch.randn(32, 4), torch.randint(2, (32,)))]
        >>> found = prune_weights_and_units(
        ...     model, data[0][0], lambda m: Calibration(m, data, nn.functional.cross_entropy), 0.75
        ... )
        >>> left = sum(int(mask.sum()) for mask in found.masks.values()) + found.units.after
        >>> left, round(0.25 * (16 * 4 + 2 * 16 + 16))
        (28, 28)
    """
    check_fraction("sparsity", sparsity, closed=False)
    check_count("steps", steps, minimum=0)
    inner = unwrap(model)
    weights, units = _weights_left(inner), _units_left(inner, example_inputs)
    schedule, reports = halving(sparsity, steps=steps), []
    for step in schedule.steps():
        wanted = round(schedule(step) * (weights + units))
        report = _prune(
            *(inner, example_inputs, calibration(inner)), weights + units - wanted, min_keep
        )
        reports += [report] if report is not None else []
    return WeightsAndUnits(
        {tensor.name: tensor.leaf != 0 for tensor in ParameterSpace(inner)},
        Amount(weights, _weights_left(inner)),
        Amount(units, _units_left(inner, example_inputs)),
        tuple(reports),
    )


def _prune(
    model: nn.Module, inputs: Any, calibration: Calibration, keep: int, min_keep: int
) -> ShrinkReport | None:
    """One step: units below the threshold are cut out, then the smallest weights make up for it."""
    groups = find_groups(model, inputs)
    importance = SNAPitImportance(calibration)
    importance.prepare(model, groups)
    scores = [importance.score(group, model) for group in groups]
    of_units = torch.cat([score for score in scores if score is not None])
    of_weights = _elasticities(model, calibration)
    pool = torch.cat([of_units.double().cpu(), of_weights[of_weights > 0].double().cpu()])
    if len(pool) <= keep:
        return None
    threshold = pool.sort(descending=True).values[max(keep - 1, 0)]
    removable = sum(max(group.units - min_keep, 0) for group in groups)
    gone = min(int((of_units.double().cpu() < threshold).sum()), removable)
    report = None
    if gone:
        total = sum(group.units for group in groups)
        report = shrink(
            *(model, inputs, importance),
            sparsity=gone / total,
            target="channels",
            allocation="global",
            repair="none",
            min_keep=min_keep,
            groups=groups,
        )
    _zero_smallest(model, calibration, max(keep - _units_left(model, inputs), 1))
    return report


def _zero_smallest(model: nn.Module, calibration: Calibration, keep: int) -> None:
    """Leave the weights of the largest elasticities."""
    scores = _elasticities(model, calibration)
    order = scores.sort(descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:keep]] = True
    tensors = list(ParameterSpace(model))
    pieces = mask.split([tensor.leaf.numel() for tensor in tensors])
    with torch.no_grad():
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.leaf.masked_fill_(~piece.view_as(tensor.leaf).to(tensor.leaf.device), 0.0)


def _elasticities(model: nn.Module, calibration: Calibration) -> Tensor:
    """Of all prunable weights, zero where they are zero, flat."""
    space = ParameterSpace(model)
    asked = calibration.with_space(space)
    changes = sensitivities(asked, space.values())
    loss = abs(mean_loss(asked, {}) + EPSILON)
    return torch.cat([changes[tensor.name].abs().flatten().cpu() / loss for tensor in space])


def _weights_left(model: nn.Module) -> int:
    return sum(int((tensor.leaf != 0).sum()) for tensor in ParameterSpace(model))


def _units_left(model: nn.Module, inputs: Any) -> int:
    return sum(group.units for group in find_groups(model, inputs))
