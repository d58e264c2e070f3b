"""Calibration: from a model, data and a loss to one stream of gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from warnings import warn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torchprune_bayes._checks import check_choice, check_count, check_positive
from torchprune_bayes._numerics.live_vector import LiveVector
from torchprune_bayes.calibration._batches import (
    Batch,
    SampleStream,
    batch_size,
    map_tensors,
    tensors_in,
)
from torchprune_bayes.calibration._engines import (
    first_sample,
    gradient_rows,
    rows_in,
    vmap_or_sequential,
)
from torchprune_bayes.calibration._functional import FunctionalModel, LossFunction, preserved
from torchprune_bayes.calibration._randomness import IsolatedRandomness
from torchprune_bayes.calibration._targets import with_sampled_targets
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    CalibrationError,
    CalibrationWarning,
)
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import ParameterPairs

_LARGEST_CHUNK = 128
_HELD_OUT_SAMPLES = 2000
_EVALUATION_BATCH = 256


@dataclass(frozen=True)
class MeanLoss:
    """A mean loss, over how many samples, and whether gradients were taken from these."""

    value: float
    samples: int
    in_sample: bool


class Calibration:
    """Data, model and loss from which methods take gradients; the model is never changed.

    Every pass runs the model in eval mode on copies of its buffers, draws the same samples in the
    same order, and leaves gradients, modes, hooks and random states as they were. A wrapped model
    (``DistributedDataParallel``, ``torch.compile``) is looked through.

    Args:
        model: The model to prune.
        data: Iterable of ``(input, target)`` batches or of mappings (Hugging Face). What a pass
            draws depends on ``seed`` alone, so a shuffling ``DataLoader`` gives a random subset,
            the same one every time.
        loss_fn: ``loss_fn(output, target)`` with mean reduction. For mappings the default is the
            model's own loss; a given one is called as ``loss_fn(output.logits, batch["labels"])``.
        params: ``(module, name)`` pairs, see :class:`~torchprune_bayes.params.ParameterSpace`.
        num_samples: Samples to take gradients from; ``None`` takes all.
        mini_batch: Samples averaged into one gradient (the papers' fisher mini-batch size m).
        seed: Seeds the drawing of samples and labels.
        fisher: ``"empirical"`` uses the data's labels, ``"true"`` draws labels from the model's
            own predictive distribution (classification with integer labels).
        vectorize: ``"auto"``, or force (``True``) or forbid (``False``) ``torch.func.vmap``.
        device: Where to compute; default is where the model is. The model itself stays.
        memory_mb: Budget in MiB for gradients held at one time.
        check_deterministic: Whether the first pass verifies that model and data repeat.
        progress: Whether long passes show a progress bar.

    Attributes:
        space: The ordered tensors, a :class:`~torchprune_bayes.params.ParameterSpace`.
        engine: How gradients are computed and why, known after the first pass: ``"vmap"``,
            ``"sequential (...)"`` or ``"mini-batch"``.

    Raises:
        ArgumentError: If an argument has an impossible value.
        ArgumentTypeError: If an argument has the wrong type.
        ParameterError: If one of ``params`` cannot be pruned.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)]
        >>> calibration = Calibration(model, data, nn.functional.cross_entropy, num_samples=20)
        >>> calibration.num_gradients, calibration.space.numel
        (20, 18)
        >>> sum(rows.shape[0] for rows in calibration.gradients())
        20
        >>> calibration.engine
        'vmap'
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        loss_fn: LossFunction | None = None,
        params: ParameterPairs | None = None,
        num_samples: int | None = None,
        mini_batch: int = 1,
        seed: int = 0,
        *,
        fisher: str = "empirical",
        vectorize: bool | str = "auto",
        device: torch.device | str | None = None,
        memory_mb: float = 1024.0,
        check_deterministic: bool = True,
        progress: bool = False,
    ) -> None:
        check_count("mini_batch", mini_batch)
        check_count("seed", seed, minimum=0)
        check_choice("fisher", fisher, ("empirical", "true"))
        check_choice("vectorize", vectorize, ("auto", True, False))
        check_positive("memory_mb", memory_mb)
        _check_num_samples(num_samples, mini_batch)
        self.space = ParameterSpace(model, params)
        place = self.space[0].leaf.device if device is None else torch.device(device)
        self._functional = FunctionalModel(self.space, loss_fn, place)
        self._stream = SampleStream(data, seed)
        self._num_samples = num_samples
        self.mini_batch = mini_batch
        self.fisher = fisher
        self.memory_mb = memory_mb
        self.progress = progress
        self.engine: str | None = "mini-batch" if mini_batch > 1 else None
        self._vectorize = vectorize
        self._to_check = check_deterministic
        self._held_out: list[Batch] | None = None

    @property
    def model(self) -> nn.Module:
        """The unwrapped model."""
        return self.space.model

    @property
    def device(self) -> torch.device:
        """Where gradients are computed."""
        return self._functional.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the gradients: float64 for a float64 model, else float32."""
        return self._functional.dtype

    @property
    def seed(self) -> int:
        """Seed of the drawing of samples."""
        return self._stream.seed

    @property
    def num_samples(self) -> int:
        """Samples that gradients are taken from; counts the data if the number was not given.

        Raises:
            CalibrationError: If the data holds no complete mini-batch.
        """
        if self._num_samples is None:
            found = self._stream.count()
            if found < self.mini_batch:
                raise CalibrationError(
                    f"Expected at least {self.mini_batch} calibration samples, got {found}."
                )
            self._num_samples = found - found % self.mini_batch
        return self._num_samples

    @property
    def num_gradients(self) -> int:
        """Number ``N`` of gradients of one pass."""
        return self.num_samples // self.mini_batch

    def pairs(self) -> list[tuple[nn.Module, str]]:
        """The ``(module, name)`` pairs, in order."""
        return self.space.pairs()

    def restricted(self, module: nn.Module, name: str) -> Calibration:
        """The same calibration for one of its tensors alone."""
        return self.with_space(self.space.restricted(module, name))

    def with_space(self, space: ParameterSpace) -> Calibration:
        """The same calibration for other tensors of its model, or for the same under masks.

        Raises:
            AlignmentError: If the tensors belong to another model.
        """
        if space.model is not self.model:
            raise AlignmentError("Expected tensors of the calibration's model, got of another.")
        other = copy.copy(self)
        other.space = space
        other._functional = FunctionalModel(space, self._functional.loss_fn, self.device)
        return other

    def reseeded(self, seed: int) -> Calibration:
        """The same calibration with another draw of the samples."""
        other = copy.copy(self)
        other._stream = SampleStream(self._stream.data, seed)
        other._held_out = None
        return other

    def gradients(
        self,
        weights: Mapping[str, Tensor] | None = None,
        live: LiveVector | None = None,
        span: tuple[int, int] | None = None,
    ) -> Iterator[Tensor]:
        """Stream the gradients of the mini-batch losses, a few rows at a time.

        Args:
            weights: Values to take the gradients at, by qualified name; default the model's own.
            live: Which entries take part, and in which order; by default all.
            span: Range ``(start, stop)`` of the live vector. Only tensors in it are
                differentiated, so that several passes can share one memory budget.

        Yields:
            ``[rows, stop - start]``, in all ``num_gradients`` rows, in the order of the data.

        Raises:
            CalibrationError: If there are fewer samples than asked, or a gradient is not finite.
        """
        live = LiveVector(self.space.masks()) if live is None else live
        start, stop = (0, live.numel) if span is None else span
        touched = live.overlap(start, stop)
        names = [name for name, _, _ in touched]
        with preserved(self.model), torch.no_grad():
            leaves, constants = self._functional.bind(weights, names)
            for found in self._gradient_rows(leaves, constants):
                columns = [
                    live.entries(name, found[name])[:, low:high] for name, low, high in touched
                ]
                rows = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
                _check_gradients(rows, columns, names)
                yield rows

    def mean_gradient(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Gradient of the mean loss over all calibration samples, by qualified name."""
        with preserved(self.model), torch.no_grad():
            leaves, constants = self._functional.bind(weights, self.space.names)
            total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
            for batch in self.batches():
                found = self._functional.mean_gradients(leaves, constants, [batch])
                for name, gradient in found.items():
                    total[name] += gradient * (batch_size(batch) / self.num_samples)
        return total

    def batches(self, size: int = _EVALUATION_BATCH) -> Iterator[Batch]:
        """Yield all calibration samples, on the device, in batches of at most ``size``."""
        for pieces in self._groups(_sizes(self.num_samples, size), self.num_samples):
            yield from pieces

    def fisher_batches(
        self, weights: Mapping[str, Tensor] | None = None, size: int = _EVALUATION_BATCH
    ) -> Iterator[Batch]:
        """Yield what :meth:`batches` does, with the labels of a Fisher.

        These are the data's own, or with ``fisher="true"`` draws from the model at ``weights``.
        """
        randomness = IsolatedRandomness(self.seed + 1, self.device)
        for batch in self.batches(size):
            if self.fisher == "true":
                with preserved(self.model), torch.no_grad(), randomness:
                    leaves, constants = self._functional.bind(weights, self.space.names)
                    batch = with_sampled_targets(self._functional, leaves, constants, batch)
            yield batch

    def loss(self, weights: Mapping[str, Tensor] | None, batch: Batch) -> Tensor:
        """Mean loss of one batch, differentiable in ``weights`` where these require gradients."""
        with preserved(self.model):
            _, constants = self._functional.bind(None)
            return self._functional.loss(weights or {}, constants, batch)

    def held_out_loss(self, weights: Mapping[str, Tensor] | None = None) -> MeanLoss:
        """Mean loss over up to 2000 samples that follow the calibration samples in the data.

        Where the data ends with the calibration samples, these are used and ``in_sample`` says so.
        The samples are drawn once and kept, up to an eighth of the memory budget.
        """
        if self._held_out is None:
            self._held_out = self._draw_held_out()
        in_sample = not self._held_out
        total, samples = 0.0, 0
        with preserved(self.model), torch.no_grad():
            _, constants = self._functional.bind(weights)
            for batch in self.batches() if in_sample else self._held_out:
                total += float(self._functional.loss({}, constants, batch)) * batch_size(batch)
                samples += batch_size(batch)
        return MeanLoss(total / samples, samples, in_sample)

    def _draw_held_out(self) -> list[Batch]:
        wanted = min(self.num_samples, _HELD_OUT_SAMPLES)
        sizes = chain([self.num_samples], _sizes(wanted, _EVALUATION_BATCH))
        kept: list[Batch] = []
        room = self.memory_mb * 2**20 / 8
        for batch in chain.from_iterable(islice(self._groups(sizes, None), 1, None)):
            room -= sum(tensor.nbytes for tensor in tensors_in(batch))
            if kept and room < 0:
                break
            kept.append(batch)
        return kept

    def _groups(self, sizes: Iterable[int], expected: int | None) -> Iterator[list[Batch]]:
        found = 0
        for pieces in self._stream.pieces(sizes):
            found += rows_in(pieces)
            yield [map_tensors(piece, self._functional.move_input) for piece in pieces]
        if expected is not None and found < expected:
            raise CalibrationError(
                f"Expected {expected} calibration samples, got {found}: lower num_samples or give "
                "more data (an iterator's samples can be drawn once only)."
            )

    def _gradient_rows(
        self, leaves: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        total = self.num_samples
        self._check_first_pass()
        vectorized = self.engine == "vmap"
        group = self._chunk(leaves) if vectorized else self.mini_batch
        randomness = IsolatedRandomness(self.seed + 1, self.device)
        bar = tqdm(total=total, desc="Gradients", unit="sample", disable=not self.progress)
        with bar:
            for pieces in self._groups(_sizes(total, group), total):
                # The model may draw random numbers, and so do labels of the true Fisher.
                with randomness:
                    if self.fisher == "true":
                        pieces = [
                            with_sampled_targets(self._functional, leaves, constants, piece)
                            for piece in pieces
                        ]
                    found = list(
                        gradient_rows(
                            self._functional, leaves, constants, pieces, vectorized=vectorized
                        )
                    )
                yield from found
                bar.update(rows_in(pieces))

    def _chunk(self, leaves: Mapping[str, Tensor]) -> int:
        per_row = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
        affordable = int(self.memory_mb * 2**20 / 4) // per_row
        return max(1, min(affordable, _LARGEST_CHUNK))

    def _check_first_pass(self) -> None:
        if self.engine is not None and not self._to_check:
            return
        pieces = next(self._groups([1], 1))
        sample = first_sample(pieces)
        if self.engine is None:
            self.engine = vmap_or_sequential(self._functional, self._vectorize, sample)
        if self._to_check:
            self._to_check = False
            _warn_if_random(self._functional, sample, first_sample(next(self._groups([1], 1))))


def _warn_if_random(functional: FunctionalModel, sample: Batch, again: Batch) -> None:
    _, constants = functional.bind(None)
    first, repeated, redrawn = (
        float(functional.loss({}, constants, batch)) for batch in (sample, sample, again)
    )
    for what, other in (("model", repeated), ("data", redrawn)):
        if other != first:
            warn(
                f"The {what} is not deterministic: the loss of the first calibration sample "
                f"changed by {abs(other - first):.1e} (from {first:.6g}) on repetition, so "
                "curvature and scores of several passes will not belong together.",
                CalibrationWarning,
                stacklevel=2,
            )


def _check_gradients(rows: Tensor, columns: list[Tensor], names: list[str]) -> None:
    if torch.isfinite(rows.sum()):
        return
    bad = [name for name, part in zip(names, columns, strict=True) if not part.isfinite().all()]
    if bad:
        raise CalibrationError(
            f"Expected finite gradients, got NaN or infinite ones in {', '.join(bad)}: "
            "check the loss, the data and the weights."
        )


def _check_num_samples(num_samples: int | None, mini_batch: int) -> None:
    if num_samples is None:
        return
    check_count("num_samples", num_samples)
    if num_samples % mini_batch:
        raise ArgumentError(
            f"Expected `num_samples` to be a multiple of mini_batch={mini_batch}, "
            f"got {num_samples}."
        )


def _sizes(total: int, size: int) -> Iterator[int]:
    yield from repeat(size, total // size)
    if total % size:
        yield total % size
