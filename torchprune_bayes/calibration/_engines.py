"""Choice of how per-sample gradients are computed, with a check of the result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torchprune_bayes.calibration._layer_rules import layer_gradients
from torchprune_bayes.calibration._room import GradientRoom
from torchprune_bayes.calibration.batches import (
    Batch,
    batch_size,
    cut,
    grouped,
    joined,
    map_tensors,
)
from torchprune_bayes.calibration.functional import FunctionalModel
from torchprune_bayes.errors import CalibrationError, TorchPruneBayesError

logger = logging.getLogger("torchprune_bayes")

_LARGEST_CHUNK = 128
# Rounding only: float32 may mean TensorFloat32 in a GPU's convolutions, with 11 bits.
_AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-8}


@dataclass(frozen=True)
class Engine:
    """A way to compute gradients.

    Attributes:
        description: Its name and, for a fallback, the reason.
        vectorized: Whether each sample of a group gives its own row, all in one pass.
        by_layers: Whether this uses the rules of the layers, and not vmap.
        activation_bytes: What a backward pass of one sample holds beside weights and gradients.
    """

    description: str
    vectorized: bool = False
    by_layers: bool = False
    activation_bytes: int = 0

    def rows_at_once(
        self, leaves: Mapping[str, Tensor], chunk_bytes: int, mini_batch: int = 1
    ) -> int:
        """Number of gradients, with their activations, per chunk."""
        if not self.vectorized:
            return 1
        gradient_bytes = sum(leaf.nbytes for leaf in leaves.values())
        row_bytes = gradient_bytes + mini_batch * self.activation_bytes
        return max(1, min(chunk_bytes // row_bytes, _LARGEST_CHUNK))

    def gradient_rows(
        self,
        functional: FunctionalModel,
        leaves: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        pieces: list[Batch],
        mini_batch: int = 1,
        room: GradientRoom | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield gradients ``{name: [rows, *shape]}``, one row for every mini-batch of the parts.

        Mini-batches of parts that cannot be joined (padded to different lengths) are processed one
        by one.
        """
        whole = _of_whole_mini_batches(pieces, mini_batch) if self.vectorized else []
        for batch in whole:
            if self.by_layers:
                count, like = batch_size(batch) // mini_batch, next(iter(leaves.values()))
                into = None if room is None else room.views(count, like)
                yield layer_gradients(functional, leaves, constants, batch, mini_batch, into)
                continue
            rows = map_tensors(batch, lambda tensor: tensor.unflatten(0, (-1, mini_batch)))
            yield functional.row_gradients(leaves, constants, rows)
        if whole:
            return
        for group in grouped(pieces, repeat(mini_batch)):
            gradients = functional.mean_gradients(leaves, constants, group)
            yield {name: gradient.unsqueeze(0) for name, gradient in gradients.items()}


def _of_whole_mini_batches(pieces: list[Batch], mini_batch: int) -> list[Batch]:
    batch = joined(pieces)
    if batch is not None:
        return [batch]
    return pieces if all(batch_size(piece) % mini_batch == 0 for piece in pieces) else []


def choose_engine(
    functional: FunctionalModel, wanted: bool | str, pieces: list[Batch], mini_batch: int = 1
) -> Engine:
    """Choose how to compute one gradient per sample or mini-batch.

    The rules of the layers come first: one pass over all samples, and a product for every
    layer. vmap is next, and then a loop. Either of the two is used if it runs and gives, on two
    real samples, the gradients that plain autograd gives.

    Args:
        functional: The model.
        wanted: ``"auto"``, ``True`` or ``False``.
        pieces: A few samples.
        mini_batch: Samples of a gradient.

    Raises:
        CalibrationError: If vmap is forced and fails, or the loss depends on weights by which
            autograd has no gradient.
    """
    leaves, constants = functional.bind(None, functional.space.names)
    samples = _two_samples(pieces)
    _refuse_unreached(functional.unreached(leaves, constants, samples[0]))
    if wanted is False:
        return Engine("sequential (vectorize=False)")
    # Plain autograd first: errors of the model itself are raised unchanged.
    measured = [
        _with_saved_bytes(
            partial(functional.mean_gradients, leaves, constants, [sample]), {**leaves, **constants}
        )
        for sample in samples
    ]
    activation_bytes = max(size for _, size in measured)
    exact = [gradients for gradients, _ in measured]
    if wanted == "auto" and _rules_are_right(functional, leaves, constants, samples, exact):
        # Outputs of the layers are held in addition to their inputs.
        return Engine("layers", True, by_layers=True, activation_bytes=2 * activation_bytes)
    if mini_batch > 1 and wanted == "auto" and _has_convolutions(functional.model):
        return Engine("sequential (mini-batches through convolutions)")
    rows = map_tensors(joined(samples), lambda tensor: tensor.unsqueeze(1))
    try:
        batched = functional.row_gradients(leaves, constants, rows)
    except RuntimeError as error:
        if wanted is True:
            raise CalibrationError(
                f"Expected a model that vmap can run for vectorize=True, got: {reason_of(error)}"
            ) from error
        return sequential_because(error)
    difference = _largest_difference(batched, exact)
    if difference > _AGREEMENT[functional.dtype]:
        logger.info("Per-sample gradients one by one: vmap differs by %.1e.", difference)
        return Engine(f"sequential (vmap differs by {difference:.1e})")
    return Engine("vmap", vectorized=True, activation_bytes=activation_bytes)


def _rules_are_right(
    functional: FunctionalModel,
    leaves: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    samples: list[Batch],
    exact: list[dict[str, Tensor]],
) -> bool:
    try:
        computed = layer_gradients(functional, leaves, constants, joined(samples))
    except RuntimeError as error:
        raise_unless_of_engine(error)
        logger.info("No gradients by the rules of the layers: %s", reason_of(error))
        return False
    difference = _largest_difference(computed, exact)
    if difference > _AGREEMENT[functional.dtype]:
        logger.info("No gradients by the rules of the layers: they differ by %.1e.", difference)
        return False
    return True


def _largest_difference(computed: Mapping[str, Tensor], exact: list[dict[str, Tensor]]) -> float:
    """Of single samples, relative to the size of their gradients; NaN counts as none."""
    differences = [
        _relative_difference({name: rows[at] for name, rows in computed.items()}, one)
        for at, one in enumerate(exact)
    ]
    return max(d for d in (*differences, 0.0) if not math.isnan(d))


def sequential_because(error: RuntimeError) -> Engine:
    """The loop, instead of a vmap that has raised ``error``.

    Raises:
        RuntimeError: The error, if vmap did not cause it, such as running out of memory.
    """
    raise_unless_of_engine(error)
    logger.info("Gradients one by one, because vmap fails here: %s", reason_of(error))
    return Engine(f"sequential (vmap fails: {reason_of(error)})")


def raise_unless_of_engine(error: RuntimeError) -> None:
    """Raise an error again unless it says that a way to compute gradients does not work."""
    out_of_memory = "memory" in str(error) and "allocate" in str(error)
    if out_of_memory or isinstance(error, (torch.OutOfMemoryError, TorchPruneBayesError)):
        raise error


def reason_of(error: Exception) -> str:
    """The first words of an error."""
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def _two_samples(pieces: list[Batch]) -> list[Batch]:
    """Two samples as batches of one, with storage of their own, whose size is measured.

    Unlike ones where they can be joined, because some losses run on equal rows only; one sample
    twice if there is no other, because a batch dimension of one hides broadcasting mistakes.
    """
    batch = joined(pieces) or pieces[0]
    two = [cut(batch, 0, 1), cut(batch, 1, 2) if batch_size(batch) > 1 else cut(batch, 0, 1)]
    return [map_tensors(sample, Tensor.clone) for sample in two]


def _refuse_unreached(names: list[str]) -> None:
    if names:
        raise CalibrationError(
            f"Expected gradients by all weights that the loss depends on, got none by "
            f"{', '.join(names)}: the graph is cut there (detach, no_grad, a part that is computed "
            "again in the backward pass). Mend it, or leave these weights out of `params`."
        )


def _has_convolutions(model: nn.Module) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kinds) for module in model.modules())


def _with_saved_bytes(
    run: Callable[[], dict[str, Tensor]], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """Run a backward pass; returns its result and the bytes it saved, not counting ``weights``."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    for weight in weights.values():
        saved.pop(weight.untyped_storage().data_ptr(), None)
    return result, sum(saved.values())


def _relative_difference(computed: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    differences = [(computed[name] - gradient).square().sum() for name, gradient in exact.items()]
    sizes = [gradient.square().sum() for gradient in exact.values()]
    difference, size = (sum(torch.stack(part).tolist()) for part in (differences, sizes))
    return (difference / max(size, torch.finfo(torch.float64).tiny)) ** 0.5 if difference else 0.0
