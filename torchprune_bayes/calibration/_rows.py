"""The rows of one pass: gradients of samples or mini-batches, by the engine that works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from torchprune_bayes.calibration._engines import Engine, choose_engine, sequential_because
from torchprune_bayes.calibration._loss_check import CHECKED_SAMPLES
from torchprune_bayes.calibration._room import GradientRoom
from torchprune_bayes.calibration.batches import Batch, cut
from torchprune_bayes.calibration.functional import FunctionalModel


@dataclass
class GradientCost:
    """What gradients took so far.

    Attributes:
        gradients: How many were computed.
        seconds: Time for them, with that for drawing their samples.
    """

    gradients: int = 0
    seconds: float = 0.0

    def add(self, gradients: int, seconds: float) -> None:
        """Count some more."""
        self.gradients += gradients
        self.seconds += seconds


class GradientRows:
    """Computes gradients by the engine that was chosen, and by the loop if that fails.

    Args:
        wanted: ``"auto"``, or force (``True``) or forbid (``False``) vmap.
        mini_batch: Samples of a gradient.
    """

    def __init__(self, wanted: bool | str, mini_batch: int) -> None:
        self._wanted = wanted
        self.mini_batch = mini_batch
        self.engine: Engine | None = None
        self.cost = GradientCost()
        self.zeros_warned = False
        self.informative = False

    def anew(self) -> GradientRows:
        """The same for another loss, which has not been checked yet."""
        other = GradientRows(self._wanted, self.mini_batch)
        other.cost = self.cost
        return other

    def choose(self, functional: FunctionalModel, pieces: list[Batch]) -> None:
        """Choose the engine with a few samples.

        Raises:
            CalibrationError: See :func:`choose_engine`.
        """
        self.engine = choose_engine(functional, self._wanted, pieces, self.mini_batch)

    def look_for_gradients(
        self,
        functional: FunctionalModel,
        leaves: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        batch: Batch,
    ) -> None:
        """Check whether a batch has a nonzero gradient; a few samples usually suffice."""
        for part in (cut(batch, 0, CHECKED_SAMPLES), batch):
            gradients = functional.mean_gradients(leaves, constants, [part])
            self.informative = any(bool(gradient.any()) for gradient in gradients.values())
            if self.informative:
                return

    def samples_at_once(self, leaves: Mapping[str, Tensor], chunk_bytes: int) -> int:
        """Number of samples whose gradients fit into ``chunk_bytes``, whole mini-batches."""
        assert self.engine is not None
        rows = self.engine.rows_at_once(leaves, chunk_bytes, self.mini_batch)
        return rows * self.mini_batch

    def compute(
        self,
        functional: FunctionalModel,
        leaves: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        pieces: list[Batch],
        room: GradientRoom,
    ) -> list[Tensor]:
        """Gradients ``[rows, D]`` in ``room``, one row for every mini-batch of the parts.

        vmap was tried on two samples; on others it may still fail, where a loss or a layer depends
        on values. The loop takes over from there.
        """
        assert self.engine is not None
        inputs = functional, leaves, constants, pieces, self.mini_batch
        start = room.done
        try:
            return [room.filled(rows) for rows in self.engine.gradient_rows(*inputs, room)]
        except RuntimeError as error:
            if not self.engine.vectorized or self._wanted is True:
                raise
            self.engine = sequential_because(error)
        room.go_back_to(start)
        return [room.filled(rows) for rows in self.engine.gradient_rows(*inputs)]
