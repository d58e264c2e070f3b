"""Calibration: one stream of gradients from a model, data and a loss."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal
from warnings import warn

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_count
from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.calibration._gradient_pass import GradientPass
from torchprune_bayes.calibration._held_out import LossesOf, MeanLoss
from torchprune_bayes.calibration._loss_check import CHECKED_SAMPLES, warn_unless_mean
from torchprune_bayes.calibration._rows import GradientCost, GradientRows
from torchprune_bayes.calibration._samples import EVALUATION_BATCH, CalibrationSamples
from torchprune_bayes.calibration._stream import SampleStream
from torchprune_bayes.calibration.batches import Batch, batch_size, map_tensors
from torchprune_bayes.calibration.fisher_targets import FisherTargets
from torchprune_bayes.calibration.functional import FunctionalModel, LossFunction, preserved
from torchprune_bayes.calibration.labels import IGNORED
from torchprune_bayes.calibration.randomness import IsolatedRandomness
from torchprune_bayes.calibration.request import GradientRequest
from torchprune_bayes.calibration.verification import (
    InformationCheck,
    check_finite_gradients,
    check_on_one_device,
    refuse_zero_gradients,
)
from torchprune_bayes.errors import AlignmentError
from torchprune_bayes.memory import MemoryBudget
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.seeds import derived_seed
from torchprune_bayes.types import ParameterPairs

_OFFLOADS = ("auto", "device", "host")


class Calibration:
    """Data, model and loss from which methods compute gradients; the model is never changed.

    Every pass runs the model in eval mode on copies of its buffers, draws the same samples in the
    same order, and does not change gradients, modes, hooks and random states. A wrapped model
    (``DistributedDataParallel``, ``torch.compile``) is unwrapped.

    Args:
        model: The model to prune.
        data: Iterable of ``(input, target)`` batches or of mappings (Hugging Face). What a pass
            draws depends only on ``seed``, so a shuffling ``DataLoader`` gives a random subset,
            the same one every time.
        loss_fn: ``loss_fn(output, target)`` with mean reduction. For mappings the default is the
            model's own loss; a given one is called as ``loss_fn(output.logits, batch["labels"])``.
            It must be the mean of the losses of the samples, or ``mini_batch`` large: a loss that
            weights or compares the samples of a batch has no per-sample gradients, which gives a
            warning.
        params: ``(module, name)`` pairs, see :class:`~torchprune_bayes.params.ParameterSpace`.
        num_samples: Samples to compute gradients of; by default those of 1024 gradients, or all if
            the data have fewer. ``"all"`` uses all.
        mini_batch: Samples averaged into one gradient (the papers' fisher mini-batch size m).
        seed: Seeds the drawing of samples and labels.
        fisher: ``"empirical"`` uses the data's labels, ``"true"`` draws labels from the model's
            own predictive distribution (a mean cross-entropy of labels, dense or binary ones too).
        ignore_index: Label without a term in the loss, for everything that counts or draws labels:
            the true Fisher, :class:`~torchprune_bayes.LayerCurvature` and methods based on it.
        vectorize: ``"auto"``: all samples at once, by the rules of the layers or
            ``torch.func.vmap``, if that is correct; ``True`` forces vmap, ``False`` processes
            samples one by one.
        device: Where to compute; by default the model's present device. The model itself is not
            moved.
        memory_mb: Budget in MiB for memory in addition to the model; ``"auto"`` uses
            half of what is free. It affects speed only, not results.
        offload: Where a curvature stores gradients: ``"device"``, the computing device, or the
            CPU if that has no float64; ``"host"``, the CPU's memory; a folder for a
            scratch file; or ``"auto"``, the first of these with enough room.
        gradient_dtype: Dtype in which they are stored, default that of the gradients;
            ``torch.bfloat16`` halves the memory and rounds them to eight bits.
        check_deterministic: Whether to verify that model and data are deterministic.
        progress: Whether long passes show a progress bar.

    Attributes:
        space: The ordered tensors, a :class:`~torchprune_bayes.params.ParameterSpace`.

    Raises:
        ArgumentError: If an argument has an impossible value.
        ArgumentTypeError: If an argument has the wrong type.
        CalibrationError: If the model is on several devices.
        ParameterError: If one of ``params`` cannot be pruned.

    A pass raises an ``AlignmentError`` if a layer was replaced since, and a ``CalibrationError`` if
    there are fewer samples than asked or nothing can be decided by the gradients.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)]
        >>> calibration = Calibration(model, data, nn.functional.cross_entropy, num_samples=20)
        >>> calibration.num_gradients, calibration.space.numel
        (20, 18)
        >>> sum(rows.shape[0] for rows in calibration.gradients())
        20
        >>> calibration.engine
        'layers'
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        loss_fn: LossFunction | None = None,
        params: ParameterPairs | None = None,
        num_samples: int | str | None = None,
        mini_batch: int = 1,
        seed: int = 0,
        *,
        fisher: str = "empirical",
        ignore_index: int = IGNORED,
        vectorize: bool | str = "auto",
        device: torch.device | str | None = None,
        memory_mb: float | Literal["auto"] = "auto",
        offload: str | Path = "auto",
        gradient_dtype: torch.dtype | None = None,
        check_deterministic: bool = True,
        progress: bool = False,
    ) -> None:
        check_count("mini_batch", mini_batch)
        check_count("seed", seed, minimum=0)
        check_choice("fisher", fisher, ("empirical", "true"))
        check_choice("vectorize", vectorize, ("auto", True, False))
        check_choice("gradient_dtype", gradient_dtype, (None, torch.float32, torch.bfloat16))
        self.space = ParameterSpace(model, params)
        check_on_one_device(self.space.model)
        place = None if device is None else torch.device(device)
        self._functional = FunctionalModel(self.space, loss_fn, place)
        self._samples = CalibrationSamples(
            SampleStream(data, seed, self._functional),
            self._functional,
            num_samples,
            mini_batch,
            check_deterministic=check_deterministic,
        )
        self.mini_batch = mini_batch
        self.fisher = fisher
        self.ignore_index = ignore_index
        self.memory = MemoryBudget.of(memory_mb, self._functional.device)
        self.offload = offload if offload in _OFFLOADS else Path(offload)
        self.gradient_dtype = gradient_dtype
        self.progress = progress
        self._rows = GradientRows(vectorize, mini_batch)
        self._share: int | None = None

    @property
    def memory_mb(self) -> float:
        """The memory budget in MiB."""
        return self.memory.total_mb

    @property
    def model(self) -> nn.Module:
        """The unwrapped model."""
        return self.space.model

    @property
    def loss_fn(self) -> LossFunction | None:
        """The loss; ``None`` where the model computes its own."""
        return self._functional.loss_fn

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
        return self._samples.stream.seed

    @property
    def data(self) -> Iterable[Batch]:
        """The data; of an iterator, which can be drawn only once, what was drawn is stored."""
        return self._samples.stream.data

    @property
    def engine(self) -> str | None:
        """How gradients are computed and why, known after the first pass.

        ``"layers"``, by the rules of the layers, ``"vmap"``, or ``"sequential (...)"``.
        """
        return None if self._rows.engine is None else self._rows.engine.description

    def samples_by_layers(self) -> int:
        """Samples that the rules of the layers take at once; 0 where these do not apply."""
        self._look_at_first_samples()
        engine = self._rows.engine
        if engine is None or not engine.by_layers:
            return 0
        return engine.rows_at_once({}, self.memory.chunk_bytes)

    @property
    def cost(self) -> GradientCost:
        """Gradients that it and its copies have computed so far, and the seconds for them."""
        return self._rows.cost

    @property
    def num_samples(self) -> int:
        """Samples to compute gradients of; counts the data if the number was not given.

        Raises:
            CalibrationError: If the data holds no complete mini-batch.
        """
        return self._samples.number

    @property
    def num_data(self) -> int:
        """Number of training samples of the model.

        These are ``num_samples`` if that is a number, otherwise all in the data.
        """
        return self._samples.in_data

    @property
    def num_gradients(self) -> int:
        """Number ``N`` of gradients of one pass."""
        return self.num_samples // self.mini_batch

    def pairs(self) -> list[tuple[nn.Module, str]]:
        """The ``(module, name)`` pairs, in order."""
        return self.space.pairs()

    def restricted(self, module: nn.Module, name: str) -> Calibration:
        """The same calibration for one of its tensors only."""
        return self.with_space(self.space.restricted(module, name))

    def with_space(self, space: ParameterSpace) -> Calibration:
        """The same calibration for other tensors of its model, or for the same ones with masks.

        Raises:
            AlignmentError: If the tensors belong to another model.
        """
        if space.model is not self.model:
            raise AlignmentError(
                "Expected tensors of the calibration's model, got those of another: build the "
                "calibration on that model."
            )
        other = copy.copy(self)
        other.space = space
        other._functional = self._functional.of(space, self.loss_fn)
        other._samples = self._samples.of_model(other._functional)
        return other

    def with_loss(self, loss_fn: LossFunction) -> Calibration:
        """The same calibration with another ``loss_fn(output, target)``."""
        other = copy.copy(self)
        other._functional = self._functional.of(self.space, loss_fn)
        other._samples = self._samples.of_model(other._functional)
        other._rows = self._rows.anew()
        return other

    def reseeded(self, seed: int) -> Calibration:
        """The same calibration with another draw of the samples.

        From data whose order does not depend on the seed it draws the same samples; see
        :meth:`redrawn`.
        """
        other = copy.copy(self)
        other._samples = self._samples.reseeded(seed)
        return other

    def redrawn(self, index: int) -> Calibration:
        """The ``index``-th further draw of samples, unrelated to those of other seeds; 0 is this.

        Data that shuffle are drawn with a new seed. Others are continued, past the
        samples of earlier draws and the held-out ones, and restarted when
        they end; so a late draw skips many samples.
        """
        if not index:
            return self
        other = copy.copy(self)
        other._samples = self._samples.redrawn(index)
        return other

    def fresh(self, index: int) -> Calibration:
        """The former name of :meth:`redrawn`, deprecated."""
        message = "`Calibration.fresh` is now `redrawn`, and goes in 0.3."
        warn(message, DeprecationWarning, stacklevel=2)
        return self.redrawn(index)

    def share(self, index: int, shares: int) -> Calibration:
        """The same calibration as one of several that together make one.

        Of the default number of samples it takes its part, and for the true Fisher it draws labels
        of its own.

        Args:
            index: Which of them, from 0.
            shares: How many there are.
        """
        other = copy.copy(self)
        other._samples = self._samples.of_share(index, shares)
        other._share = index
        return other

    def gradients(
        self,
        weights: Mapping[str, Tensor] | None = None,
        remaining: RemainingVector | None = None,
        span: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Stream the gradients of the mini-batch losses, a few rows at a time.

        Args:
            weights: Values to take the gradients at, by qualified name; default the model's own.
            remaining: Which entries take part, and in which order; by default all.
            span: Range ``(start, stop)`` of the remaining vector. Only tensors in it are
                differentiated, so that several passes can share one memory budget.
            out: ``[num_gradients, stop - start]`` of the calibration's dtype and device, where all
                rows are written; what is yielded are then views of it.

        Yields:
            ``[rows, stop - start]``, in all ``num_gradients`` rows, in the order of the data; on
            the device, or on the CPU if that has no float64.

        Raises:
            ArgumentError: If there are no entries in the range.
            CalibrationError: If there are fewer samples than requested, a gradient is not finite,
                or all of them are zero.
        """
        place = float64_device(self.device)
        remaining = RemainingVector(self.space.masks()) if remaining is None else remaining
        request = GradientRequest(weights, remaining, span or (0, remaining.numel), out)
        information = InformationCheck(self.mini_batch, self.ignore_index)
        for rows in self.gradient_rows(request):
            information.add(rows)
            yield rows.to(place)
        if request.is_whole:  # a part may well be zero
            self._rows.zeros_warned = information.finish(warned=self._rows.zeros_warned)

    def gradient_rows(self, request: GradientRequest) -> Iterator[Tensor]:
        """Stream gradients as :meth:`gradients` does, on the device, and without its last check.

        Yields:
            ``[rows, stop - start]``, finite; all of them may be zero.
        """
        self._look_at_first_samples()
        yield from GradientPass(
            self._functional,
            self._samples,
            self._rows,
            self._targets(),
            self.randomness(),
            self.memory.chunk_bytes,
            self.progress,
        ).gradients(request)

    def mean_gradient(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Gradient of the mean loss over all calibration samples, by qualified name.

        Raises:
            CalibrationError: If there are fewer samples than requested, or it is zero or not
                finite.
        """
        leaves, constants = self._functional.bind(weights, self.space.names)
        total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        randomness = self.randomness()
        for batch in self.batches():
            with preserved(self.model), randomness:
                gradients = self._functional.mean_gradients(leaves, constants, [batch])
            for name, gradient in gradients.items():
                total[name] += gradient * (batch_size(batch) / self.num_samples)
        check_finite_gradients(total)
        if not any(gradient.any() for gradient in total.values()):
            refuse_zero_gradients("the mean over all samples", self.ignore_index)
        place = float64_device(self.device)
        return {name: gradient.to(place) for name, gradient in total.items()}

    def batches(self, size: int = EVALUATION_BATCH) -> Iterator[Batch]:
        """Yield all calibration samples, on the device, in batches of at most ``size``."""
        return self._samples.batches(size)

    def fisher_batches(
        self, weights: Mapping[str, Tensor] | None = None, size: int = EVALUATION_BATCH
    ) -> Iterator[Batch]:
        """Yield batches as :meth:`batches`, with the labels of a Fisher.

        These are the data's own, or with ``fisher="true"`` draws from the model at ``weights``.

        Raises:
            CalibrationError: At the end, if the gradients of all batches are zero.
        """
        leaves, constants = self._functional.bind(weights, self.space.names)
        randomness, targets = self.randomness(), self._targets()
        for batch in self.batches(size):
            with preserved(self.model), randomness:
                batch = targets.put_into(batch, leaves, constants)
                if not self._rows.informative:
                    self._rows.look_for_gradients(self._functional, leaves, constants, batch)
            yield batch
        if not self._rows.informative:
            refuse_zero_gradients("all batches", self.ignore_index)

    def loss(self, weights: Mapping[str, Tensor] | None, batch: Batch) -> Tensor:
        """Mean loss of one batch, differentiable in ``weights`` where these require gradients."""
        _, constants = self._functional.bind(None)
        with preserved(self.model), self.randomness():
            return self._functional.loss(weights or {}, constants, batch)

    def held_out_loss(self, weights: Mapping[str, Tensor] | None = None) -> MeanLoss:
        """Mean loss over samples that follow the calibration samples in the data.

        These are up to 2000, or up to as many as there are gradients if these are more.
        Where the data ends with the calibration samples, these are used and ``in_sample`` says so.
        The samples are drawn once and stored, up to an eighth of the memory budget. Those without a
        finite loss at the model's own weights are dropped with a warning.

        Raises:
            CalibrationError: If there is no sample with a finite loss.
        """
        engine = self._rows.engine
        activations = 0 if engine is None else engine.activation_bytes
        held_out = self._samples.held_out(self.memory.held_out_bytes, activations)
        return held_out.mean_loss(self.losses_at, weights)

    def losses_at(self, weights: Mapping[str, Tensor] | None) -> LossesOf:
        """A function for the mean losses of batches, with the same random numbers at all weights.

        Args:
            weights: Values, by qualified name; default the model's own.
        """
        _, constants = self._functional.bind(weights)
        randomness = self.randomness()

        def losses_of(batches: Iterable[Batch]) -> list[Tensor]:
            with preserved(self.model), randomness, torch.no_grad():
                moved = (map_tensors(batch, self._functional.move_input) for batch in batches)
                return [self._functional.loss({}, constants, batch) for batch in moved]

        return losses_of

    def _look_at_first_samples(self) -> None:
        """Choose the engine, and check that gradients of single samples belong to the loss."""
        if self._rows.engine is not None:
            return
        pieces = next(self._samples.groups(CHECKED_SAMPLES))
        with preserved(self.model), self.randomness():
            self._rows.choose(self._functional, pieces)
        if self.mini_batch == 1 and self.fisher == "empirical":  # "true" looks at the loss itself
            warn_unless_mean(self.losses_at(None), pieces)

    @property
    def functional(self) -> FunctionalModel:
        """The model as a function of its weights, for other passes than those above."""
        return self._functional

    def randomness(self) -> IsolatedRandomness:
        """Random states in which a pass runs, the same for all; use with ``preserved``."""
        return IsolatedRandomness(derived_seed(self.seed, "model"), self.device)

    def _targets(self) -> FisherTargets:
        share = () if self._share is None else (self._share,)
        seed = derived_seed(self.seed, "labels", *share)
        return FisherTargets(self._functional, self.fisher, seed, self.ignore_index)
