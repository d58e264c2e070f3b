"""Which way per-sample gradients are computed, and the proof that it gives the right ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from torchprune_bayes.calibration._batches import Batch, batch_size, cut, map_tensors
from torchprune_bayes.calibration._functional import FunctionalModel

logger = logging.getLogger("torchprune_bayes")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_AGREEMENT = 1e-3


def vmap_or_sequential(functional: FunctionalModel, wanted: bool | str, sample: Batch) -> str:
    """Choose the engine for one gradient per sample; the answer starts with its name.

    vmap is taken where it runs and gives, on one real sample, the gradient that plain autograd
    gives. On CPUs a convolution's per-sample weight gradient is a grouped convolution, measured 2
    to 6 times slower than one backward pass per sample, so there the loop is taken unless forced.

    Args:
        functional: The model.
        wanted: ``"auto"``, ``True`` or ``False``.
        sample: One sample, as a batch of one.
    """
    if wanted is False:
        return "sequential (vectorize=False)"
    convolutional = any(isinstance(module, _CONVOLUTIONS) for module in functional.model.modules())
    if wanted == "auto" and convolutional and functional.device.type == "cpu":
        return "sequential (convolutions on a CPU)"
    leaves, constants = functional.bind(None, functional.space.names)
    try:
        batched = functional.per_sample_gradients(leaves, constants, _doubled(sample))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        if wanted is True:
            raise
        reason = str(error).splitlines()[0][:100]
        logger.info("Per-sample gradients one by one, because vmap fails here: %s", reason)
        return f"sequential (vmap fails: {reason})"
    exact = functional.mean_gradients(leaves, constants, [sample])
    difference = _relative_difference({name: rows[1] for name, rows in batched.items()}, exact)
    if difference > _AGREEMENT:
        logger.info("Per-sample gradients one by one: vmap differs by %.1e.", difference)
        return f"sequential (vmap differs by {difference:.1e})"
    return "vmap"


def gradient_rows(
    functional: FunctionalModel,
    leaves: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    pieces: list[Batch],
    *,
    vectorized: bool,
) -> Iterator[dict[str, Tensor]]:
    """Yield gradients ``{name: [rows, *shape]}`` of a group of samples.

    Vectorized, every sample of ``pieces`` gives a row; otherwise the group is one mini-batch.
    """
    if vectorized:
        for piece in pieces:
            yield functional.per_sample_gradients(leaves, constants, piece)
    else:
        found = functional.mean_gradients(leaves, constants, pieces)
        yield {name: gradient.unsqueeze(0) for name, gradient in found.items()}


def first_sample(pieces: list[Batch]) -> Batch:
    """Return the first sample of a group as a batch of one."""
    return cut(pieces[0], 0, 1)


def rows_in(pieces: list[Batch]) -> int:
    """Number of samples in a group of pieces."""
    return sum(batch_size(piece) for piece in pieces)


def _doubled(sample: Batch) -> Batch:
    # Two equal rows, not one: a batch dimension of one hides broadcasting mistakes.
    return map_tensors(sample, lambda tensor: torch.cat([tensor, tensor]))


def _relative_difference(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    difference = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    size = sum(float(gradient.square().sum()) for gradient in exact.values())
    return (difference / max(size, torch.finfo(torch.float64).tiny)) ** 0.5 if difference else 0.0
