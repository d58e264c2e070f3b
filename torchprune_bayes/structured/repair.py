"""Compensation for removed units: re-fit the consumer layers on the remaining units.

In plain words: a forward pass on calibration data stops at each layer that reads removed units.
What it read from them is predicted from its other inputs by least squares, the prediction is added
to its weights and its bias, and the pass continues with these. So a later layer is fitted on the
inputs that it will really get. Statistics of batch norms behind it are recomputed on the way.

He, Zhang and Sun, 2017, "Channel Pruning for Accelerating Very Deep Neural Networks",
https://arxiv.org/abs/1707.06168, for all layers that read a unit, in one pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_positive
from torchprune_bayes._numerics.input_moments import Fit
from torchprune_bayes.calibration import Calibration, batch_size
from torchprune_bayes.structured._pairs import Pairs
from torchprune_bayes.structured._reader import Reader
from torchprune_bayes.structured._readers import (
    Tensors,
    first_samples,
    readers_of,
    rows_that_go,
    watched,
)
from torchprune_bayes.structured._space import space_of
from torchprune_bayes.structured._walk import MOST_SAMPLES, LayerRepair, Walk
from torchprune_bayes.structured.groups import Kept, UnitGroup
from torchprune_bayes.structured.slicing import plan_of

__all__ = ["LayerRepair", "Repair", "repair"]

logger = logging.getLogger("torchprune_bayes")


@dataclass(frozen=True)
class Repair:
    """New values that compensate for units about to be removed.

    Attributes:
        values: By first qualified name, with the shapes before the cut: weights (zero where they
            read removed units), biases, and statistics of batch norms.
        layers: Fits, in the order of the forward pass.
        skipped: Layers that read removed units and are cut without a fit, because the forward pass
            does not call them as modules, or they are not a plain matrix product.
        seconds: Duration.
    """

    values: dict[str, Tensor]
    layers: tuple[LayerRepair, ...]
    skipped: tuple[str, ...]
    seconds: float = 0.0


def repair(
    calibration: Calibration,
    groups: Sequence[UnitGroup],
    kept: Kept,
    *,
    damping: float | str = "auto",
) -> Repair:
    """Fit all layers that read units about to be removed, on the remaining units.

    Each layer ``y = Wx + b`` gets ``W' = W_K + W_Z G_ZK (G_KK + λI)⁻¹`` and the bias
    ``b + (W - W')·mean(x)``, where ``G`` is the covariance of its inputs on the calibration
    samples (of a convolution: of the patches under its kernel), ``K`` the remaining and ``Z`` the
    removed inputs. A layer without a bias takes mean products in place of covariances, unless a
    batch norm directly behind it removes the mean. Layers are fitted in the order of the forward
    pass, each on the inputs that the repaired layers before it give. Running statistics of batch
    norms are recomputed, such that the outputs of each have the mean and variance that they had
    before.

    Dimensions of queries and keys are read by each other: of one side ``k_Z ≈ B k_K`` is fitted, on
    the inputs in the whole model and without a mean, and the layer of the other produces
    ``q_K + Bᵀ q_Z``.

    The model is not changed: pass ``values`` to
    :func:`~torchprune_bayes.structured.apply_plan`. :func:`~torchprune_bayes.structured.shrink`
    does all this itself.

    Args:
        calibration: Data and model, without the labels; of its samples the first 4096, or as many
            as fit into its memory at once, but 256 in any case.
        groups: The groups of its model.
        kept: The units to keep.
        damping: ``λ`` relative to the mean diagonal of ``G_KK``, but for inputs that are always
            zero, whose weights stay; ``"auto"`` chooses one of five
            values for each layer by predicting half of the samples from the other half.

    Returns:
        The new values, and the quality of the fits.

    Raises:
        ArgumentError: If an argument has an impossible value or does not fit the model.
        CalibrationError: If the data gives no usable activations.

    Cost: one forward pass over the samples, and one for batch norms, where the samples fit into
    memory at once, else about half a pass for each layer. For a layer with ``d`` inputs (times the
    kernel's size) ``n d²`` in float64 for the covariance, where ``n`` is at most
    ``max(32 d, 16384)`` rows drawn from all samples, and a few times ``d³/3`` for the fit.

    Example:
        >>> from torchprune_bayes.structured import apply_plan, find_groups, plan_of
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))  # 8 units of rank 4
        >>> x = torch.randn(64, 4)
        >>> before = model(x)
        >>> calibration = Calibration(model, [(x, x[:, :2])], nn.functional.mse_loss)
        >>> groups = find_groups(model, x)
        >>> kept = {"0": torch.arange(4)}
        >>> found = repair(calibration, groups, kept, damping=1e-9)
        >>> _ = apply_plan(model, plan_of(model, groups, kept), values=found.values)
        >>> bool(torch.allclose(model(x), before, atol=1e-3))
        True
    """
    if isinstance(damping, str):
        check_choice("damping", damping, ("auto",))
    else:
        check_positive("damping", damping)
    start = time.perf_counter()
    model = calibration.model
    readers, skipped = readers_of(model, groups)
    keeps = _keeps(model, groups, kept, readers)
    readers = {name: reader for name, reader in readers.items() if name in keeps}
    pairs = Pairs(model, [group for group in groups if group.name in kept])
    if not readers and not pairs.readers:
        return Repair({}, (), tuple(skipped))
    space, _ = space_of(model, [p for group in groups for p in group.slices if p.role != "norm"])
    calibration = calibration.with_space(space)
    gone = _gone(groups, kept)
    tensors = _without_dimensions(calibration, pairs, groups, gone, damping)
    walk = Walk(calibration, readers, keeps, damping, tensors, rows_that_go(model, groups, gone))
    walk.run()
    done = {fit.name for fit in walk.fits}
    skipped += [reader.path for reader in readers.values() if reader.path not in done]
    if skipped:
        logger.warning(
            "Not repaired, because the forward pass does not call them as plain layers: %s.",
            ", ".join(skipped),
        )
    seconds = time.perf_counter() - start
    products = (_of_product(name, fits) for name, fits in pairs.fits.items())
    return Repair(walk.values(), (*walk.fits, *products), tuple(skipped), seconds)


def _without_dimensions(
    calibration: Calibration,
    pairs: Pairs,
    groups: Sequence[UnitGroup],
    gone: Mapping[str, Tensor],
    damping: float | str,
) -> Tensors:
    """Layers without the removed queries and keys, fitted on the inputs in the whole model."""
    batches = list(first_samples(calibration, MOST_SAMPLES)) if pairs.readers else []
    samples = sum(batch_size(batch) for batch in batches)
    with watched(pairs.readers.values(), samples), torch.no_grad():
        for batch in batches:
            calibration.loss(None, batch)
    return pairs.without(groups, gone, damping)


def _of_product(name: str, fits: Sequence[Fit]) -> LayerRepair:
    """Error of the queries, or keys, summed over all heads."""
    dampings = [fit.damping for fit in fits]
    cut, left = sum(fit.cut_error for fit in fits), sum(fit.error for fit in fits)
    return LayerRepair(name, cut, left, sum(dampings) / len(dampings))


def _gone(groups: Sequence[UnitGroup], kept: Kept) -> dict[str, Tensor]:
    """The removed units, by the name of their group."""
    found = {}
    for group in groups:
        if group.name in kept:
            gone = torch.ones(group.units, dtype=torch.bool)
            gone[kept[group.name].cpu()] = False
            found[group.name] = gone.nonzero()[:, 0]
    return found


def _keeps(
    model: nn.Module, groups: Sequence[UnitGroup], kept: Kept, readers: Mapping[str, Reader]
) -> dict[str, Tensor]:
    """Which inputs are kept, for the readers that lose some."""
    plan = plan_of(model, groups, kept)
    keeps = {}
    for name, reader in readers.items():
        indices = plan.kept.get(name, {}).get(reader.dim)
        if indices is not None:
            keeps[name] = torch.zeros(plan.shapes[name][reader.dim], dtype=torch.bool)
            keeps[name][indices] = True
    return keeps
