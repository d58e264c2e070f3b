"""Magnitude pruning, the baseline of all others."""

from __future__ import annotations

from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


@register("magnitude", title="smallest |w|", paper="", needs_calibration=False)
class Magnitude(PruningMethod):
    """Prune the smallest absolute weights, over all tensors or in each.

    The masks are those of the host's ``L1Unstructured``, except that ties go by index and that
    the threshold comes from histograms, not from a sort of all weights.

    Args:
        amount: Fraction or number of the live entries to prune.
        scope: ``"global"`` or ``"layer"``.

    Raises:
        ArgumentError: If an argument has an impossible value.
        ArgumentTypeError: If ``amount`` is no number.

    Cost: linear in the number of weights; a copy of the weights and one byte per weight.

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
