"""Running statistics of batch normalisation, recomputed after weights have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchprune_bayes._checks import check_count
from torchprune_bayes.calibration.batches import Batch, map_tensors
from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.calibration.randomness import IsolatedRandomness
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.params import unwrap

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Batch], *, num_batches: int | None = None
) -> None:
    """Recompute the running statistics of all batch normalisation layers on given data.

    Pruning shifts the activations, so the statistics of the dense model no longer fit. Each
    statistic becomes the plain mean over the batches (``momentum=None``), whatever their order.

    Only these statistics change: other layers run as in evaluation (no dropout), and modes,
    weights, gradients and random states are unchanged. If anything fails, the old statistics
    are restored. Wrapped models are supported; each process uses its own data.

    Args:
        model: The model; a layer without running statistics is not changed.
        batches: ``(input, target)`` pairs, mappings (passed as keyword arguments) or inputs.
        num_batches: How many batches to use at most; ``None`` uses all.

    Raises:
        ArgumentError: If ``num_batches`` is below 1.
        CalibrationError: If there are no batches.

    Cost: one forward pass per batch.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> data = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])]
        >>> reestimate_batch_norm(norm, data)
        >>> norm.running_mean, norm.running_var
        (tensor([4.]), tensor([2.]))
    """
    # torch.optim.swa_utils.update_bn is not used: it puts the whole model into train mode, which
    # turns dropout on and draws random numbers, gives all submodules the mode of the root
    # afterwards, takes no mappings, and leaves incomplete statistics behind if a batch fails.
    if num_batches is not None:
        check_count("num_batches", num_batches)
    model = unwrap(model)
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not layers:
        return
    device = layers[0].running_mean.device  # type: ignore[union-attr]  # just filtered
    with preserved(model), _restarted(layers), torch.no_grad(), IsolatedRandomness(0, device):
        used = 0
        for batch in islice(batches, num_batches):
            args, kwargs = _arguments(map_tensors(batch, lambda tensor: tensor.to(device)))
            model(*args, **kwargs)
            used += 1
        if not used:
            raise CalibrationError(
                "Expected at least one batch, got none: an iterator can be used once only."
            )


@contextmanager
def _restarted(layers: list[_BatchNorm]) -> Iterator[None]:
    momenta = [layer.momentum for layer in layers]
    buffers = [getattr(layer, name) for layer in layers for name in _STATISTICS]
    before = [buffer.clone() for buffer in buffers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # selects the cumulative mean
        layer.training = True
    try:
        yield
    except BaseException:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _arguments(batch: Batch) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    inputs = batch[0] if isinstance(batch, tuple) else batch
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}
