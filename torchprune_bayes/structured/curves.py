"""Loss curves: the rise of the loss as one group loses its units, measured on calibration data.

In plain words: scores are local; the importance of half of a layer is measured. For each
group a few numbers of units are removed, least important first, the layers that read them are
re-fit, and the loss is evaluated. The curves are made convex, and their slopes compare units of
different groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm.auto import tqdm

from torchprune_bayes._checks import check_count
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError, CalibrationError
from torchprune_bayes.structured._space import space_of
from torchprune_bayes.structured._trials import MOST_SAMPLES, Trials
from torchprune_bayes.structured.groups import UnitGroup

_POINTS = 8
_LEAST_SAMPLES = 256
_SAMPLE_LOSSES = 60 * _LEAST_SAMPLES
"""Of all points together, so that few points are taken on more samples each."""


@dataclass(frozen=True)
class LossCurve:
    """Loss against units removed from one group, all others whole.

    Attributes:
        group: Name of the group.
        units: Number of its units.
        removed: Numbers of removed units at the points, ascending, from 0.
        loss: The loss there; the first one is that of the whole model.
    """

    group: str
    units: int
    removed: tuple[int, ...]
    loss: tuple[float, ...]

    def slopes(self) -> Tensor:
        """Rise of the convex curve for each further unit, float64 ``[units]``, never falling.

        The curve is replaced by its lower convex hull, with no point below the start. Between the
        middles of the hull's segments the slope is interpolated, so that a segment is not removed
        as a whole; past the last point the last slope is used.

        Example:
            >>> LossCurve("0", 4, (0, 2, 4), (1.0, 1.0, 3.0)).slopes()
            tensor([0.0000, 0.2500, 0.7500, 1.0000], dtype=torch.float64)
        """
        hull = _lower_hull(
            [
                (float(count), max(value - self.loss[0], 0.0))
                for count, value in zip(self.removed, self.loss, strict=True)
            ]
        )
        if len(hull) < 2:
            return torch.zeros(self.units, dtype=torch.float64)
        steps = list(pairwise(hull))
        middles = [(left[0] + right[0]) / 2 for left, right in steps]
        slopes = [(right[1] - left[1]) / (right[0] - left[0]) for left, right in steps]
        return _interpolated(torch.arange(self.units).double() + 0.5, middles, slopes)


def measure_curves(
    calibration: Calibration,
    groups: Sequence[UnitGroup],
    orders: Mapping[str, Tensor],
    *,
    evaluations: int = 60,
    min_keep: int = 1,
    damping: float = 1e-3,
) -> list[LossCurve]:
    """Measure the loss curves of groups.

    Args:
        calibration: Data, model and loss, of which the first 512 samples are used for the fits, and
            for the losses 256 to 512, as many as cost 60 points on 256 samples. There is a
            progress bar if its ``progress`` says so.
        groups: Groups of its model.
        orders: For each group, its units in the order of removal; groups that are missing
            have no curve.
        evaluations: Largest number of points, shared between the groups, eight each at most and
            one each at least.
        min_keep: Units that every group keeps.
        damping: Ridge of the fits, as in :func:`~torchprune_bayes.structured.repair`.

    Returns:
        The curves, in the order of the groups.

    Raises:
        ArgumentError: If there are fewer evaluations than groups.
        CalibrationError: If the loss of the whole model is not finite.

    Cost: one evaluation of the loss for each point, and one for the whole model; one pass for the
    inputs' moments of all layers, or more if memory demands it. What runs before the layers that
    read a group runs for its first point alone, where its outputs fit into the memory.
    """
    check_count("evaluations", evaluations)
    chosen = [group for group in groups if group.name in orders and group.units > min_keep]
    if chosen and evaluations < len(chosen):
        raise ArgumentError(
            f"Expected at least one evaluation for each of {len(chosen)} groups, got "
            f"evaluations={evaluations}: raise it, or leave groups out with `ignored`."
        )
    if not chosen:
        return []
    space, _ = space_of(
        calibration.model, [p for group in chosen for p in group.slices if p.role != "norm"]
    )
    each = evaluations // len(chosen)
    points = {group.name: _counts(group.units - min_keep, each) for group in chosen}
    total = sum(map(len, points.values()))
    _, tried = points_on(total)
    trials = Trials(calibration.with_space(space), damping, tried)
    whole = trials.loss({})
    if not whole < float("inf"):
        raise CalibrationError(
            f"Expected a finite loss of the whole model, got {whole}: "
            "check the data and the loss function."
        )
    curves = []
    with tqdm(total=total, unit="point", disable=not calibration.progress) as bar:
        for part in trials.parts(chosen):
            trials.watch(part)
            for group in part:
                losses, playback = [whole], trials.playback()
                for count in points[group.name]:
                    tensors = trials.without(group, orders[group.name][:count])
                    losses.append(trials.loss(tensors, playback))
                    bar.update()
                removed = (0, *points[group.name])
                curves.append(LossCurve(group.name, group.units, removed, tuple(losses)))
    return curves


def points_on(points: int) -> tuple[int, int]:
    """Largest number of samples for the fits of all points, and for the loss of each.

    Example:
        >>> points_on(60), points_on(30)
        ((512, 256), (512, 512))
    """
    tried = _SAMPLE_LOSSES // max(points, 1)
    return MOST_SAMPLES, min(max(tried, _LEAST_SAMPLES), MOST_SAMPLES)


def _counts(removable: int, points: int) -> tuple[int, ...]:
    """Numbers of units to remove, evenly spread, the last one all that may be removed."""
    points = min(points, _POINTS, removable)
    return tuple(round(removable * (index + 1) / points) for index in range(points))


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lower convex hull of points with ascending first entries, ends included."""
    hull: list[tuple[float, float]] = []
    for point in points:
        if point[1] == float("inf"):
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(
    left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]
) -> bool:
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) >= rise


def _interpolated(at: Tensor, places: Sequence[float], values: Sequence[float]) -> Tensor:
    """Piecewise linear interpolation; constant outside."""
    x, y = (torch.tensor(list(each), dtype=torch.float64) for each in (places, values))
    if len(x) == 1:
        return y.expand(len(at)).clone()
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    share = ((at - x[right - 1]) / (x[right] - x[right - 1])).clamp(0.0, 1.0)
    return y[right - 1] + share * (y[right] - y[right - 1])
