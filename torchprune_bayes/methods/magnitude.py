"""Magnitude pruning, the baseline of all others."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils import prune

from torchprune_bayes._checks import count_to_prune
from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


@register("magnitude", title="smallest |w|", paper="", needs_calibration=False)
class Magnitude(PruningMethod, prune.L1Unstructured):
    """Prune the smallest absolute weights, over all tensors or in each.

    The masks are those of the host's ``L1Unstructured``, which this class is; only the selection
    differs (a histogram threshold with ties by index, instead of a sort of all weights).

    Args:
        amount: Fraction or number of the live entries to prune.
        scope: ``"global"`` or ``"layer"``.

    Cost: linear in the number of weights; one byte per weight.

    Example:
        >>> import torch
        >>> from torchprune_bayes import prune_global
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -3.0, 2.0]]))
        >>> prune_global([(layer, "weight")], Magnitude, amount=1).masks["0.weight"]
        tensor([[False,  True,  True]])
    """

    needs_calibration = False

    def __init__(self, amount: float | int, *, scope: str = "global") -> None:
        super().__init__(amount, scope=scope)

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The host's door: rank the live entries ``t`` by absolute value."""
        if self._planned is None:
            if self.scope == "layer":
                raise ArgumentError(
                    "Expected scope='global' in prune.global_unstructured, which shows a method "
                    "no layers, got 'layer': use prune_global."
                )
            values = t[default_mask == 1].detach().abs()
            (self._planned,) = smallest_k([values], count_to_prune(self.amount, len(values)))
        return super().compute_mask(t, default_mask)

    def decide(self, space: ParameterSpace) -> Decision:
        """Rank by absolute value."""
        scores = {name: value.abs() for name, value in space.values().items()}
        masks = space.masks()
        kept = Target(masks, self.amount, scope=self.scope).keep(0, scores, masks)
        return Decision(kept, scores=scores)


@register("layer-magnitude", title="smallest |w| of each tensor", paper="", needs_calibration=False)
class LayerMagnitude(Magnitude):
    """:class:`Magnitude` with ``scope="layer"``: the fraction ``amount`` of every tensor goes."""

    def __init__(self, amount: float | int, *, scope: str = "layer") -> None:
        super().__init__(amount, scope=scope)
