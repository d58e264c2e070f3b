"""Optimal brain damage with the diagonal of the empirical Fisher."""

from __future__ import annotations

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods._curvature_holder import CurvatureHolder
from torchprune_bayes.methods._obd import obd_decision
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


@register(
    "diagonal-fisher",
    title="optimal brain damage with mean squared gradients",
    paper="arXiv:1801.05787",
)
class DiagonalFisher(CurvatureHolder[LayerCurvature]):
    """Prune the weights with the smallest ``½ w_i² F_ii``, ``F_ii = (1/N) Σ_n g_ni²``.

    `Fisher pruning (Theis et al., 2018) <https://arxiv.org/abs/1801.05787>`_, for single weights:
    near a minimum ``F_ii`` stands for the Hessian's diagonal, and ``½ w_i² F_ii`` for the rise of
    the loss when only weight ``i`` is removed. The weights that are kept do not move.

    It is the cheapest second-order baseline, and the scope matters more to it than to others: on
    MLPNet at 95 % sparsity accuracy is about 79 with one threshold over all layers and about 21
    with one per layer, which is how the WoodFisher paper ran it.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: Data, model and loss.
        curvature: A :class:`~torchprune_bayes.curvature.LayerCurvature` fitted already, with
            structure ``"diagonal"`` or ``"both"``.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.

    Raises:
        ArgumentTypeError: If there is neither calibration nor curvature.
        AlignmentError: If the curvature was fitted to other entries.

    Cost: about one training pass over the calibration samples; ``4D`` bytes.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration, prune_global
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        >>> data = [(torch.tensor([[3.0, 1.0, 1.0]]), torch.zeros(1, 1))]
        >>> calibration = Calibration(layer, data, torch.nn.functional.mse_loss)
        >>> prune_global(None, DiagonalFisher, amount=1, calibration=calibration).masks["weight"]
        tensor([[ True, False,  True]])
    """

    curvature_type = LayerCurvature

    def decide(self, space: ParameterSpace) -> Decision:
        """Rank the remaining entries of ``space`` by ``½ w_i² F_ii``."""
        weights, masks = space.values(), space.masks()
        fisher = self.curvature
        if fisher is None:
            fisher = mean_squared_gradients(self.required_calibration)
            fisher.fit(self.required_calibration, weights, masks)
        fisher.check_fitted_to(masks)
        diagonal = fisher.diagonal()
        missing = [name for name in masks if name not in diagonal]
        if missing:
            raise ArgumentError(
                f"Expected a curvature with the diagonal of `{missing[0]}`, got one with Kronecker "
                "factors of it: fit it with structure='both'."
            )
        target = Target(masks, self.amount, scope=self.scope)
        return obd_decision(target, weights, diagonal, gradients=fisher.count)


def mean_squared_gradients(calibration: Calibration) -> LayerCurvature:
    """An unfitted ``(1/N) Σ_n g_n²`` of the gradients that a calibration gives.

    These are of single samples, or averaged over its mini-batches, which makes the mean of their
    squares smaller by about the size of these.
    """
    return LayerCurvature(token_loss="mean", mini_batch=calibration.mini_batch)
