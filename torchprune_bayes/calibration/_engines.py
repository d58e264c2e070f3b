"""Which way per-sample gradients are computed, and the proof that it gives the right ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torchprune_bayes.calibration._batches import Batch, batch_size, grouped, joined, map_tensors
from torchprune_bayes.calibration._functional import FunctionalModel
from torchprune_bayes.errors import CalibrationError

logger = logging.getLogger("torchprune_bayes")

_LARGEST_CHUNK = 128
# Rounding alone: float32 may mean TensorFloat32 in a GPU's convolutions, with 11 bits.
_AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-8}


@dataclass(frozen=True)
class Engine:
    """A way to compute gradients.

    Attributes:
        description: Its name and, for a fallback, the reason.
        vectorized: Whether each sample of a group gives a row of its own, all in one pass.
        activation_bytes: What a backward pass of one sample holds beside weights and gradients.
    """

    description: str
    vectorized: bool = False
    activation_bytes: int = 0

    def rows_at_once(
        self, leaves: Mapping[str, Tensor], memory_mb: float, mini_batch: int = 1
    ) -> int:
        """How many gradients, with their activations, a quarter of the memory budget holds."""
        if not self.vectorized:
            return 1
        gradient_bytes = sum(leaf.nbytes for leaf in leaves.values())
        row_bytes = gradient_bytes + mini_batch * self.activation_bytes
        return max(1, min(int(memory_mb * 2**20 / 4) // row_bytes, _LARGEST_CHUNK))

    def gradient_rows(
        self,
        functional: FunctionalModel,
        leaves: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        pieces: list[Batch],
        mini_batch: int = 1,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield gradients ``{name: [rows, *shape]}``, one row for every mini-batch of the pieces.

        Mini-batches of pieces that cannot be joined (padded to different lengths) go one by one.
        """
        whole = _of_whole_mini_batches(pieces, mini_batch) if self.vectorized else []
        for batch in whole:
            rows = map_tensors(batch, lambda tensor: tensor.unflatten(0, (-1, mini_batch)))
            yield functional.row_gradients(leaves, constants, rows)
        if whole:
            return
        for group in grouped(pieces, repeat(mini_batch)):
            found = functional.mean_gradients(leaves, constants, group)
            yield {name: gradient.unsqueeze(0) for name, gradient in found.items()}


def _of_whole_mini_batches(pieces: list[Batch], mini_batch: int) -> list[Batch]:
    batch = joined(pieces)
    if batch is not None:
        return [batch]
    return pieces if all(batch_size(piece) % mini_batch == 0 for piece in pieces) else []


def choose_engine(
    functional: FunctionalModel, wanted: bool | str, sample: Batch, mini_batch: int = 1
) -> Engine:
    """Choose how to compute one gradient per sample or mini-batch.

    vmap is taken where it runs and gives, on one real sample, the gradient that plain autograd
    gives. From about eight samples at a time on it is up to ten times as fast as a loop for small
    layers, and about as fast for wide ones, convolutions on a CPU included. A whole mini-batch
    keeps a convolution busy by itself, and faster than vmap does.

    Args:
        functional: The model.
        wanted: ``"auto"``, ``True`` or ``False``.
        sample: One sample, as a batch of one.
        mini_batch: Samples of a gradient.

    Raises:
        CalibrationError: If vmap is wanted and fails.
    """
    if wanted is False:
        return Engine("sequential (vectorize=False)")
    if mini_batch > 1 and wanted == "auto" and _has_convolutions(functional.model):
        return Engine("sequential (mini-batches through convolutions)")
    leaves, constants = functional.bind(None, functional.space.names)
    sample = map_tensors(sample, Tensor.clone)  # its storage is measured, not the whole batch's
    try:
        batched = functional.row_gradients(leaves, constants, _two_rows_of(sample))
    except Exception as error:  # of any kind; what is wrong with the model itself shows in the loop
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        if wanted is True:
            raise CalibrationError(
                f"Expected a model that vmap can run for vectorize=True, got: {reason}"
            ) from error
        logger.info("Per-sample gradients one by one, because vmap fails here: %s", reason)
        return Engine(f"sequential (vmap fails: {reason})")
    exact, activation_bytes = _with_saved_bytes(
        lambda: functional.mean_gradients(leaves, constants, [sample]), {**leaves, **constants}
    )
    difference = _relative_difference({name: rows[1] for name, rows in batched.items()}, exact)
    if difference > _AGREEMENT[functional.dtype]:
        logger.info("Per-sample gradients one by one: vmap differs by %.1e.", difference)
        return Engine(f"sequential (vmap differs by {difference:.1e})")
    return Engine("vmap", vectorized=True, activation_bytes=activation_bytes)


def _two_rows_of(sample: Batch) -> Batch:
    # Two equal rows, not one: a batch dimension of one hides broadcasting mistakes.
    return map_tensors(sample, lambda tensor: torch.stack([tensor, tensor]))


def _has_convolutions(model: nn.Module) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kinds) for module in model.modules())


def _with_saved_bytes(
    run: Callable[[], dict[str, Tensor]], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """Run a backward pass; returns its result and the bytes it saved, ``weights`` not counted."""
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


def _relative_difference(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    difference = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    size = sum(float(gradient.square().sum()) for gradient in exact.values())
    return (difference / max(size, torch.finfo(torch.float64).tiny)) ** 0.5 if difference else 0.0
