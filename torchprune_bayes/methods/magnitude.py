"""Magnitude pruning, the baseline of all others."""

from __future__ import annotations

from collections.abc import Mapping

from torchprune_bayes._checks import check_choice
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


@register("magnitude", title="smallest |w|", paper="", needs_calibration=False)
class Magnitude(PruningMethod):
    """Prune the smallest absolute weights, over all tensors or in each.

    The masks are those of PyTorch's ``L1Unstructured``, except that ties go by index and that
    the threshold comes from histograms, not from a sort of all weights.

    Args:
        amount: Fraction or number of the remaining entries to prune; with ``scope="layer"`` a
            fraction, or the number for each tensor by qualified name.
        scope: ``"global"`` or ``"layer"``.
        compat: ``"paper"`` takes over the threshold of the WoodFisher and CBS code, which prunes
            one entry more and all ties.

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
        >>> prune_global(layer, Magnitude, amount=1).masks["weight"]
        tensor([[False,  True,  True]])
    """

    needs_calibration = False

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        scope: str = "global",
        compat: str | None = None,
    ) -> None:
        super().__init__(amount, scope=scope)
        check_choice("compat", compat, (None, "paper"))
        self.compat = compat

    def decide(self, space: ParameterSpace) -> Decision:
        """Rank by absolute value."""
        scores = {name: value.abs() for name, value in space.values().items()}
        masks = space.masks()
        target = Target(masks, self.amount, scope=self.scope, strict=self.compat == "paper")
        return Decision(target.keep(0, scores, masks), scores=scores)


@register("layer-magnitude", title="smallest |w| of each tensor", paper="", needs_calibration=False)
class LayerMagnitude(Magnitude):
    """:class:`Magnitude` with ``scope="layer"``: prune ``amount`` of every tensor."""

    def __init__(self, amount: float | int | Mapping[str, int], *, scope: str = "layer") -> None:
        super().__init__(amount, scope=scope)
