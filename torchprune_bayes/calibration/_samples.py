"""The samples of a calibration: how many, which draw of the data, and those held out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator

from torchprune_bayes._distributed import share_of
from torchprune_bayes.calibration._held_out import HeldOutSamples
from torchprune_bayes.calibration._stream import SampleStream
from torchprune_bayes.calibration.batches import Batch, cut, map_tensors, samples_in, sizes, without
from torchprune_bayes.calibration.functional import FunctionalModel
from torchprune_bayes.calibration.verification import RepeatCheck, check_num_samples
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.seeds import derived_seed

logger = logging.getLogger("torchprune_bayes")

EVALUATION_BATCH = 512
_CPU_BATCHES = 128, 2048
_CACHE_BYTES = 2**23  # activations that stay in a cache: twice as fast with a ResNet-20
_DEFAULT_GRADIENTS = 1024
_HELD_OUT_SAMPLES = 2000


class CalibrationSamples:
    """The samples that gradients are computed of, the same ones in the same order on every pass.

    Args:
        stream: The data.
        functional: The model, on whose device samples are needed.
        num_samples: Number of samples; ``None`` for the default, ``"all"`` for all.
        mini_batch: Samples of a gradient.
        check_deterministic: Whether to verify that model and data are deterministic.
    """

    def __init__(
        self,
        stream: SampleStream,
        functional: FunctionalModel,
        num_samples: int | str | None,
        mini_batch: int,
        *,
        check_deterministic: bool,
    ) -> None:
        self.stream = stream
        self._functional = functional
        self._given = self._number = check_num_samples(num_samples, mini_batch)
        self._limit = None if num_samples == "all" else _DEFAULT_GRADIENTS * mini_batch
        self._mini_batch = mini_batch
        self._draw = 0
        self._held_out: HeldOutSamples | None = None
        self._repeats = RepeatCheck(
            functional, derived_seed(stream.seed, "model"), enabled=check_deterministic
        )

    @property
    def draw(self) -> tuple[int, int]:
        """Seed and number of the draw."""
        return self.stream.seed, self._draw

    @property
    def number(self) -> int:
        """Samples of a pass; counts the data if the number was not given.

        Raises:
            CalibrationError: If the data holds no complete mini-batch.
        """
        if self._number is None:
            count = self.stream.count(self._limit)
            if count < self._mini_batch:
                raise CalibrationError(
                    f"Expected at least {self._mini_batch} samples in the data, got {count}."
                )
            self._number = count - count % self._mini_batch
            if self._number == self._limit:
                logger.info("Gradients of %d samples; num_samples='all' takes all.", self._limit)
        return self._number

    @property
    def in_data(self) -> int:
        """The number of samples if it was given, otherwise all in the data."""
        return self.stream.length() if self._given is None else self._given

    def of_model(self, functional: FunctionalModel) -> CalibrationSamples:
        """The same samples for other tensors of the model, or another loss."""
        other = copy.copy(self)
        other._functional = functional
        return other

    def of_share(self, index: int, shares: int) -> CalibrationSamples:
        """The same, with the part of one of several processes of the default number."""
        other = copy.copy(self)
        if self._limit is not None:
            other._limit = (
                share_of(self._limit // self._mini_batch, index, shares) * self._mini_batch
            )
        return other

    def reseeded(self, seed: int) -> CalibrationSamples:
        """The draw of another seed."""
        other = copy.copy(self)
        other.stream = self.stream.reseeded(seed)
        other._repeats = self._repeats.restarted()
        other._held_out = None
        return other

    def redrawn(self, index: int) -> CalibrationSamples:
        """The ``index``-th further draw, see :meth:`Calibration.redrawn`."""
        other = self.reseeded(derived_seed(self.stream.seed, index))
        other._draw = self._draw + index
        return other

    def groups(self, size: int, skipped: int = 0) -> Iterator[list[Batch]]:
        """Yield the samples after the first ``skipped``, on the device, ``size`` at a time.

        Yields:
            The batches that the samples of a group come from, cut; not joined, because batches
            that were padded to different lengths cannot be.

        Raises:
            AlignmentError: If a layer was replaced.
            CalibrationError: If the data hold fewer samples than asked for.
        """
        self._functional.space.check_in_model()
        passed, total = 0, self.number
        for pieces in self.stream.drawn(self._draw, total, self._reserved(), sizes(total, size)):
            moved = [map_tensors(piece, self._functional.move_input) for piece in pieces]
            if not passed:
                self._repeats.begin_pass(cut(moved[0], 0, 1))
            left = list(without(moved, max(skipped - passed, 0)))
            passed += samples_in(moved)
            if left:
                yield left
        if passed < total:
            raise CalibrationError(
                f"Expected {total} calibration samples, got {passed}: lower num_samples or give "
                "more data (an iterator's samples can be drawn once only)."
            )

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield the samples, on the device, in batches of at most ``size``."""
        for pieces in self.groups(size):
            yield from pieces

    def held_out(self, room_bytes: float, activation_bytes: int = 0) -> HeldOutSamples:
        """The samples that follow in the data, drawn once; where there are none, these.

        Args:
            room_bytes: Largest size of what is kept.
            activation_bytes: What the model holds for a sample, which bounds the batches on a CPU;
                0 if unknown.
        """
        if self._held_out is None:
            self._held_out = self._drawn_held_out(room_bytes, self._batch_size(activation_bytes))
        return self._held_out

    def _drawn_held_out(self, room_bytes: float, size: int) -> HeldOutSamples:
        drawn = self.stream.following(self.number, self._reserved(), size, room_bytes)
        kept = [map_tensors(batch, self._functional.move_input) for batch in drawn]
        if kept:
            return HeldOutSamples(lambda: kept, in_sample=False)
        return HeldOutSamples(lambda: self.batches(size), in_sample=True)

    def _batch_size(self, activation_bytes: int) -> int:
        if self._functional.device.type != "cpu":
            return EVALUATION_BATCH
        low, high = _CPU_BATCHES
        return min(max(_CACHE_BYTES // activation_bytes, low), high) if activation_bytes else low

    def _reserved(self) -> int:
        """Samples that are held out, at most."""
        return min(self.number, max(_HELD_OUT_SAMPLES, self.number // self._mini_batch))
