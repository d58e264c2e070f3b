"""Second moments of the inputs of a model's layers, and new weights layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes.calibration import Batch, Calibration
from torchprune_bayes.calibration.batches import joined
from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.curvature.layers.inputs import (
    Finished,
    Gathering,
    InputMoment,
    Update,
    layers_of,
    watched,
)
from torchprune_bayes.curvature.layers.padding import RealTokens, all_tokens
from torchprune_bayes.errors import CalibrationError
from torchprune_bayes.types import Masks

_BATCH = 128
_ACTIVATIONS = 8  # tensors of the size of a layer's input that a forward pass holds, roughly


class LayerInputs:
    """The inputs of a model's layers at given weights; nothing of the model is changed.

    A pass with hooks sums ``x xᵀ`` over all tokens of all calibration samples, a layer that is
    called several times, or whose weight is tied to another's, over all its calls.

    Args:
        calibration: Model and data.
        ignore_padding: Whether to ignore tokens that the batch's ``attention_mask``, and of a
            decoder beside an encoder the ``decoder_attention_mask``, leaves out; see
            :class:`~torchprune_bayes.curvature.layers.padding.RealTokens`.

    Example:
        >>> linear = torch.nn.Linear
        >>> model = torch.nn.Sequential(linear(3, 2), torch.nn.ReLU(), linear(2, 2))
        >>> data = [(torch.randn(16, 3), torch.randint(2, (16,)))]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> moments = LayerInputs(calibration).moments()
        >>> moments["2.weight"].tokens, moments["2.weight"].mean.shape
        (16, torch.Size([1, 2, 2]))
    """

    def __init__(self, calibration: Calibration, *, ignore_padding: bool = True) -> None:
        self.calibration = calibration
        self.ignore_padding = ignore_padding
        self._layers = layers_of(calibration.space)

    @property
    def names(self) -> list[str]:
        """The tensors whose layers have inputs."""
        return list(self._layers)

    def moments(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, InputMoment]:
        """Moments of all layers from one pass.

        Args:
            weights: Values by qualified name; default the model's own.

        Cost: a forward pass, ``n²`` multiplications per token and ``n²`` numbers per layer.
        """
        run = _Run(self, weights)
        moments: dict[str, InputMoment] = {}
        run.stage(self._batches(_BATCH), self.names, lambda name, m: moments.update({name: m}))
        return moments

    def update(
        self,
        update: Update,
        weights: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> dict[str, Tensor]:
        """New weights layer by layer, in call order: later ones see the outputs of earlier ones.

        Args:
            update: Called once for each tensor of :attr:`names`.
            weights: Values to begin with; default the model's own.
            masks: Which of their entries are not zero; default all.

        Returns:
            The new values of the tensors, in the calibration's dtype.

        Cost: one forward pass where all samples go through the model at once, with the memory of
        their activations; where the calibration's budget does not hold these, or batches have
        other lengths, one forward pass for each set of layers with the same input.
        """
        run = _Run(self, weights, masks)
        batches, calls = self._batches(_BATCH), run.calls_of_one()
        whole = joined(batches) if calls.entries * self._bytes() <= self._room() else None
        stages = [list(calls.names)] if whole is not None else calls.stages
        for stage in stages:
            run.stage([whole] if whole is not None else batches, stage, update, calls.counts)
        return {name: run.weights[name] for name in self.names}

    def _batches(self, size: int) -> list[Batch]:
        return list(self.calibration.batches(size))

    def _bytes(self) -> float:
        width = torch.finfo(self.calibration.dtype).bits / 8
        return _ACTIVATIONS * width * self.calibration.num_samples

    def _room(self) -> float:
        return self.calibration.memory.total_bytes


@dataclass
class _Calls:
    """Trace of one sample's pass: which layers are called, in which order, with which inputs."""

    counts: dict[str, int] = field(default_factory=dict)
    stages: list[list[str]] = field(default_factory=list)
    entries: int = 0
    """Of the largest input."""

    @property
    def names(self) -> Iterator[str]:
        """All tensors, in order."""
        return (name for stage in self.stages for name in stage)


class _Run:
    """Passes at weights that change layer by layer."""

    def __init__(
        self,
        inputs: LayerInputs,
        weights: Mapping[str, Tensor] | None,
        masks: Masks | None = None,
    ) -> None:
        self._inputs = inputs
        self._functional = inputs.calibration.functional
        self._randomness = inputs.calibration.randomness()
        values = inputs.calibration.space.values() if weights is None else weights
        move = self._functional.move
        self.weights = {
            name: move(value).clone() if masks is None else move(value) * move(masks[name])
            for name, value in values.items()
        }
        _, self._constants = self._functional.bind(None)

    def calls_of_one(self) -> _Calls:
        """Calls of the first sample; layers that it does not reach keep their listed order."""
        calls = _Calls()
        last: list[Tensor | None] = [None]

        def note(name: str, x: Tensor) -> None:
            if name not in calls.counts:
                if x is last[0]:
                    calls.stages[-1].append(name)
                else:
                    calls.stages.append([name])
            calls.counts[name] = calls.counts.get(name, 0) + 1
            calls.entries = max(calls.entries, x.numel())
            last[0] = x

        first = next(self._inputs.calibration.batches(1))
        self._forward(first, self._inputs.names, note)
        unseen = [name for name in self._inputs.names if name not in calls.counts]
        calls.stages += [[name] for name in unseen]
        return calls

    def stage(
        self,
        batches: Sequence[Batch],
        names: Collection[str],
        update: Update,
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Gather the moments of some tensors; each is updated after its last token."""
        layers = self._inputs._layers
        moments = {name: InputMoment.of(layers[name][0], self.weights[name]) for name in names}
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            missing = {name: counts.get(name, -1) for name in names} if counts else {}
            real = RealTokens(batch, self._inputs.calibration.model)
            rows = real.rows if self._inputs.ignore_padding else all_tokens
            gathering = Gathering(moments, layers, rows, missing)
            gathering.finish = partial(self._apply, update, moments) if last else None
            with real.followed():
                self._forward(batch, names, gathering.see)
        for name in list(moments):
            self._apply(update, moments, name)

    def _apply(self, update: Update, moments: dict[str, InputMoment], name: str) -> None:
        moment = moments.pop(name)
        if not moment.total.isfinite().all():
            raise CalibrationError(
                f"Expected finite inputs of the layer of `{name}`, got NaN or infinite ones: check "
                "the data and the weights."
            )
        moment.total = moment.total.to(float64_device(moment.total.device))
        new = update(name, moment)
        if new is not None:
            self.weights[name].copy_(new)

    def _forward(
        self, batch: Batch, names: Collection[str], see: Callable[[str, Tensor], None]
    ) -> None:
        calibration = self._inputs.calibration
        with (
            preserved(calibration.model),
            self._randomness,
            torch.no_grad(),
            watched(self._inputs._layers, names, see),
            suppress(Finished),
        ):
            self._functional.output(self.weights, self._constants, batch)
