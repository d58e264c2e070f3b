"""The diagonal of the Hessian of the calibration loss, exactly or by Hutchinson's estimator."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchprune_bayes._checks import check_count
from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes.calibration import Calibration, batch_size
from torchprune_bayes.curvature.leaves import leaves_of
from torchprune_bayes.errors import ArgumentError, CalibrationError
from torchprune_bayes.types import Masks

logger = logging.getLogger("torchprune_bayes")

_MOST_FOR_EXACT = 20_000
_BATCH = 64
_LARGEST_CHUNK = 16

Vectors = Mapping[str, Tensor]


def hessian_diagonal(
    calibration: Calibration,
    *,
    probes: int | None = None,
    weights: Mapping[str, Tensor] | None = None,
    masks: Masks | None = None,
) -> dict[str, Tensor]:
    """``H_ii`` of the mean loss over all calibration samples, at the remaining entries.

    Exactly, by one Hessian-vector product per remaining weight; or estimated by `Hutchinson's
    method (Bekas, Kokiopoulou and Saad, 2007)
    <https://doi.org/10.1016/j.apnum.2007.01.003>`_, the mean of ``z ⊙ Hz`` over probes ``z`` of
    random signs, which is unbiased with variance ``Σ_{j≠i} H_ij²`` per probe. Probes are drawn from
    the calibration's seed, on the CPU, so that they do not depend on batch size, device or memory.

    Args:
        calibration: Data, model and loss.
        probes: Number of probes; ``None`` is exact.
        weights: Values by qualified name; default the model's own.
        masks: Remaining entries; default those of the model.

    Returns:
        By qualified name, float64 and shaped like the tensors; zero where pruned.

    Raises:
        ArgumentError: If an exact diagonal is requested for more than 20,000 remaining weights.
        CalibrationError: If an entry is not finite, or there are too few samples.

    Cost: per weight or probe about two passes for gradients of all samples; batches of 64 samples
    and at most 16 products at a time, so the activations of 1024 samples in memory.

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> data = [(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 1))]
        >>> calibration = Calibration(model, data, torch.nn.functional.mse_loss)
        >>> hessian_diagonal(calibration)
        {'weight': tensor([[ 2.,  8., 18.]], dtype=torch.float64)}
    """
    masks = calibration.space.masks() if masks is None else masks
    masks = {name: mask.to(calibration.device) for name, mask in masks.items()}
    _check_probes(probes, sum(int(mask.sum()) for mask in masks.values()))
    leaves = leaves_of(calibration, weights)
    place = float64_device(calibration.device)
    total = {
        name: torch.zeros(leaf.shape, dtype=torch.float64, device=place)
        for name, leaf in leaves.items()
    }
    # Fused attention kernels have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in calibration.batches(_BATCH):
            share = batch_size(batch) / calibration.num_samples
            loss = share * calibration.loss(leaves, batch)
            derivatives = torch.autograd.grad(
                loss, list(leaves.values()), create_graph=True, materialize_grads=True
            )
            gradients = dict(zip(leaves, derivatives, strict=True))
            for vectors in _vectors(calibration, masks, probes):
                for name, product in _hessian_times(vectors, gradients, leaves).items():
                    total[name] += (vectors[name] * product).sum(0).to(place)
    _check_finite_entries(total)
    return {name: value / (probes or 1) for name, value in total.items()}


def _vectors(calibration: Calibration, masks: Masks, probes: int | None) -> Iterator[Vectors]:
    """Yield stacks of vectors ``z``, ``{name: [rows, *shape]}``; whose ``z ⊙ Hz`` are summed.

    Unit vectors come for one tensor at a time: of their products no other part is needed.
    """
    bytes_per_vector = sum(mask.numel() for mask in masks.values()) * calibration.dtype.itemsize
    rows = calibration.memory.chunk_bytes // bytes_per_vector
    rows = max(1, min(rows, _LARGEST_CHUNK))
    if probes is None:
        return _unit_vectors(masks, rows, calibration.dtype)
    return _random_signs(masks, rows, calibration.dtype, probes, calibration.seed)


def _unit_vectors(masks: Masks, rows: int, dtype: torch.dtype) -> Iterator[Vectors]:
    for name, mask in masks.items():
        for indices in mask.flatten().nonzero().split(rows):
            units = torch.zeros(len(indices), mask.numel(), dtype=dtype, device=mask.device)
            yield {name: units.scatter_(1, indices, 1.0).unflatten(1, mask.shape)}


def _random_signs(
    masks: Masks, rows: int, dtype: torch.dtype, probes: int, seed: int
) -> Iterator[Vectors]:
    generator = torch.Generator().manual_seed(seed)

    def signs(mask: Tensor) -> Tensor:
        bits = torch.randint(0, 2, mask.shape, generator=generator, dtype=torch.int8)
        return (2 * bits - 1).to(mask.device, dtype) * mask

    for first in range(0, probes, rows):
        stack = [
            {name: signs(mask) for name, mask in masks.items()}
            for _ in range(first, min(first + rows, probes))
        ]
        yield {name: torch.stack([vector[name] for vector in stack]) for name in masks}


def _hessian_times(
    vectors: Vectors, gradients: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> Vectors:
    """``Hz`` for a stack of vectors, where they are not zero: ``{name: [rows, *shape]}``."""
    attached = [name for name in vectors if gradients[name].requires_grad]
    if not attached:  # the loss is linear in these weights
        return {}
    inputs = [leaves[name] for name in vectors]
    outputs = [gradients[name] for name in attached]

    def product(vector: Vectors) -> dict[str, Tensor]:
        directions = [vector[name] for name in attached]
        derivatives = torch.autograd.grad(
            outputs, inputs, directions, retain_graph=True, materialize_grads=True
        )
        return dict(zip(vector, derivatives, strict=True))

    try:
        return vmap(product)(vectors)
    except RuntimeError as error:
        logger.info("Hessian-vector products one by one, because vmap fails here: %s", error)
    rows = len(next(iter(vectors.values())))
    products = [product({name: stack[i] for name, stack in vectors.items()}) for i in range(rows)]
    return {name: torch.stack([row[name] for row in products]) for name in vectors}


def _check_probes(probes: int | None, remaining: int) -> None:
    if probes is not None:
        check_count("probes", probes)
    elif remaining > _MOST_FOR_EXACT:
        raise ArgumentError(
            f"Expected at most {_MOST_FOR_EXACT} remaining weights for an exact Hessian diagonal, "
            f"which takes a Hessian-vector product for each, got {remaining}: pass probes=64, for "
            "example, for Hutchinson's estimate."
        )


def _check_finite_entries(diagonal: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in diagonal.items() if not value.isfinite().all()]
    if bad:
        raise CalibrationError(
            f"Expected a finite Hessian diagonal, got NaN or infinite entries in {', '.join(bad)}: "
            "check the loss, the data and the weights."
        )
