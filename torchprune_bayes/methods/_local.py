"""Base of methods that prune layer by layer, from the inputs of each layer only."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import count_to_prune
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature.layer_inputs import LayerInputs
from torchprune_bayes.curvature.layers.inputs import InputMoment, matrix_of, weight_of
from torchprune_bayes.errors import ArgumentError, CalibrationWarning
from torchprune_bayes.methods._pattern import Pattern, kept_by
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


class LayerLocalPruning(PruningMethod):
    """Base class of the methods that see a layer's weights and inputs, and no loss.

    Layers are pruned in the order of the model's calls, so that later ones see the outputs of those
    that are pruned already.

    Args:
        amount: Fraction of the remaining entries to prune, or the number in each tensor; ``None``
            with a pattern.
        calibration: Data and model.
        pattern: ``"N:M"`` keeps ``N`` of every ``M`` inputs of an output.
        ignore_padding: Whether tokens that the ``attention_mask``, or of a decoder beside an
            encoder the ``decoder_attention_mask``, leaves out do not count.
        scope: ``"layer"`` prunes each tensor to ``amount``; ``"global"`` shares the count out by
            the dense scores of all tensors.
    """

    always_moves = True

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None,
        *,
        calibration: Calibration | None = None,
        pattern: str | None = None,
        ignore_padding: bool = True,
        scope: Literal["global", "layer"] = "layer",
    ) -> None:
        self.pattern = None if pattern is None else Pattern.n_of_m(pattern)
        if self.pattern is not None:
            amount = self.pattern.amount(amount)
        super().__init__(amount, calibration=calibration, scope=scope)  # type: ignore[arg-type]
        self.ignore_padding = ignore_padding

    @abstractmethod
    def scores(self, gram: Tensor, weights: Tensor) -> Tensor:
        """Scores ``[rows, n]`` of the dense weights for the second moment ``[n, n]``."""

    @abstractmethod
    def prune_rows(
        self, gram: Tensor, weights: Tensor, remaining: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """New weights and mask ``[rows, n]`` of one layer, with ``count`` entries less."""

    def decide(self, space: ParameterSpace) -> Decision:
        """Choose masks and new weights; the model is not changed.

        Args:
            space: The calibration's parameters.

        Raises:
            CalibrationError: If the layers' inputs are not finite.
        """
        masks, weights = dict(space.masks()), space.values()
        calibration = self.required_calibration.with_space(space)
        inputs = LayerInputs(calibration, ignore_padding=self.ignore_padding)
        counts = self._counts(space, inputs)
        left = set(weights)

        def update(name: str, moment: InputMoment) -> Tensor | None:
            if not moment.tokens:
                return None
            left.discard(name)
            new, masks[name] = self._pruned(moment, weights[name], masks[name], counts[name])
            return new

        updated = inputs.update(update, weights)
        if left:
            part = space.subset(left)
            sizes = {name: value.abs() for name, value in part.values().items()}
            few = {name: counts[name] for name in sizes}
            masks |= kept_by(part, sizes, few, pattern=self.pattern, scope="layer")
            warnings.warn(
                f"The weights of {', '.join(sorted(left))} are pruned by magnitude, because no "
                "calibration sample reaches them or they are of no linear layer or convolution: "
                "give more samples, or leave them out.",
                CalibrationWarning,
                stacklevel=2,
            )
        info = {"pruned": counts}
        if not self.always_moves:
            return Decision(masks, info=info)
        new = {n: updated.get(n, value).to(value) * masks[n] for n, value in weights.items()}
        return Decision(masks, new, info=info)

    def _counts(self, space: ParameterSpace, inputs: LayerInputs) -> dict[str, int]:
        """Entries to prune in each tensor."""
        masks = space.masks()
        if self.pattern is not None:
            dims = self.pattern.dims(space)
            target = self.pattern.target(masks, dims, self.amount, steps=1, scope="layer")
            assert isinstance(target.amount, Mapping)
            return {name: int(target.amount[name]) for name in masks}
        if self.scope == "layer":
            amounts = self.amount if isinstance(self.amount, Mapping) else None
            if amounts is not None and set(amounts) != set(masks):
                raise ArgumentError(
                    f"Expected amounts for {', '.join(masks)}, got {', '.join(amounts)}."
                )
            return {
                name: count_to_prune(
                    amounts[name] if amounts is not None else self.amount,  # type: ignore[arg-type]
                    int(mask.sum()),
                )
                for name, mask in masks.items()
            }
        kept = Target(masks, self.amount).keep(0, self._dense_scores(space, inputs), masks)
        return {name: int((mask & ~kept[name]).sum()) for name, mask in masks.items()}

    def _dense_scores(self, space: ParameterSpace, inputs: LayerInputs) -> dict[str, Tensor]:
        weights = space.values()
        dense = {name: wide(value.abs()) for name, value in weights.items()}
        for name, moment in inputs.moments().items():
            if moment.tokens:
                rows = matrix_of(moment.module, weights[name].to(moment.total.device))
                scores = [self.scores(g, w) for g, w in zip(moment.mean, rows, strict=True)]
                dense[name] = weight_of(moment.module, torch.stack(scores), dense[name])
        return dense

    def _pruned(
        self, moment: InputMoment, weight: Tensor, mask: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        module, place = moment.module, moment.total.device
        rows, remaining = (matrix_of(module, t.to(place)) for t in (weight, mask))
        order = channels_last(module, rows.shape[-1]).to(place)
        back = order.argsort()
        parts = shares(count, [int(part.sum()) for part in remaining])
        pruned = [
            self.prune_rows(g[order][:, order], w[:, order], r[:, order], k)
            for g, w, r, k in zip(moment.mean, rows, remaining, parts, strict=True)
        ]
        new, keep = (torch.stack(part)[..., back] for part in zip(*pruned, strict=True))
        return weight_of(module, new, weight), weight_of(module, keep, mask)


def channels_last(module: nn.Module, columns: int) -> Tensor:
    """The columns in an order in which the input channels at one place of a kernel are neighbours.

    Example:
        >>> channels_last(nn.Conv1d(2, 1, 3), 6)
        tensor([0, 3, 1, 4, 2, 5])
    """
    taps = torch.Size(getattr(module, "kernel_size", ())).numel()
    return torch.arange(columns).view(-1, taps).mT.reshape(-1)


def shares(count: int, sizes: list[int]) -> list[int]:
    """A count shared out in proportion to sizes, to the last one.

    Example:
        >>> shares(5, [4, 4, 2])
        [2, 2, 1]
    """
    total, parts, seen, given = sum(sizes), [], 0, 0
    for size in sizes:
        seen += size
        share = round(count * seen / total) - given if total else 0
        parts.append(share)
        given += share
    return parts
