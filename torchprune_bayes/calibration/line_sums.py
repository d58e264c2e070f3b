"""Products of weights with the gradients of samples, summed along dimensions of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.calibration._engines import raise_unless_of_engine
from torchprune_bayes.calibration._layer_rules import layer_line_sums
from torchprune_bayes.calibration.batches import batch_size
from torchprune_bayes.calibration.calibration import Calibration
from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.calibration.verification import check_finite_gradients

Lines: TypeAlias = Mapping[str, Sequence[int]]
"""Dimensions of weights by their names."""


def line_sums(calibration: Calibration, lines: Lines) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Stream ``Σ w ∂ℓ_n/∂w`` over the entries at each place along dimensions of the weights.

    Derivatives by gates on rows or columns of weights are sums of these.

    Args:
        calibration: Data, model and loss, on the weights concerned.
        lines: Which dimensions of which weights.

    Yields:
        ``[k, places]`` by name and dimension for ``k`` gradients at a time, float64 or as the
        device has it; what the loss does not reach is missing.

    Raises:
        CalibrationError: As :meth:`Calibration.gradients` does.

    Cost: one forward and backward pass where layers have rules and every sample is its own
    gradient; otherwise one pass of gradients, which are formed. Eight bytes for each sum.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.ones(3, 2), torch.zeros(3, 1))]
        >>> calibration = Calibration(layer, data, nn.functional.mse_loss)
        >>> [found] = line_sums(calibration, {"weight": [0, 1]})
        >>> {line: sums.shape for line, sums in found.items()}
        {('weight', 0): torch.Size([3, 1]), ('weight', 1): torch.Size([3, 2])}
    """
    try:
        found = list(_by_rules(calibration, lines))
    except RuntimeError as error:
        raise_unless_of_engine(error)
        found = []
    yield from found or _by_gradients(calibration, lines)


def summed(values: Tensor, *kept: int) -> Tensor:
    """Sum over all dimensions but some, in float64.

    Example:
        >>> summed(torch.ones(2, 3, 4), 1)
        tensor([8., 8., 8.], dtype=torch.float64)
    """
    others = [dim for dim in range(values.ndim) if dim not in kept]
    return wide(values.sum(others, dtype=torch.float64) if others else values)


def _by_rules(calibration: Calibration, lines: Lines) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Nothing where the layers have no rules."""
    size = calibration.samples_by_layers() if calibration.mini_batch == 1 else 0
    if not size:
        return
    functional = calibration.functional
    leaves, constants = functional.bind(None, list(lines))
    values = _values(calibration)
    randomness = calibration.randomness()
    total = calibration.num_samples
    with tqdm(total=total, unit="sample", disable=not calibration.progress) as bar:
        for batch in calibration.fisher_batches(size=size):
            with preserved(calibration.model), randomness:
                found = layer_line_sums(functional, leaves, constants, batch, values, lines)
            check_finite_gradients({name: sums for (name, _), sums in found.items()})
            yield {line: wide(sums) for line, sums in found.items()}
            bar.update(batch_size(batch))


def _by_gradients(
    calibration: Calibration, lines: Lines
) -> Iterator[dict[tuple[str, int], Tensor]]:
    values = _values(calibration)
    sizes = [value.numel() for value in values.values()]
    for rows in calibration.gradients():
        parts = zip(values.items(), rows.split(sizes, dim=1), strict=True)
        found: dict[tuple[str, int], Tensor] = {}
        for (name, value), part in parts:
            product = part.unflatten(1, value.shape).mul_(value.to(part))
            found |= {(name, dim): summed(product, dim + 1, 0) for dim in lines.get(name, ())}
        yield found


def _values(calibration: Calibration) -> dict[str, Tensor]:
    return {
        name: value.to(calibration.device, calibration.dtype)
        for name, value in calibration.space.values().items()
    }
