"""Optimal brain damage: the diagonal of the Hessian itself."""

from __future__ import annotations

from torchprune_bayes._checks import check_count
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import hessian_diagonal
from torchprune_bayes.methods._obd import obd_decision
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.methods.registry import register
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Decision


@register(
    "hessian-diagonal",
    title="optimal brain damage with the Hessian's diagonal",
    paper="LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989",
)
class HessianDiagonal(PruningMethod):
    """Prune the weights with the smallest ``½ w_i² |H_ii|``.

    `Optimal brain damage (LeCun, Denker and Solla, 1989)
    <https://papers.nips.cc/paper/250-optimal-brain-damage>`_: with the Hessian ``H`` of the mean
    calibration loss, at a minimum, the loss rises by ``½ w_i² H_ii`` when only weight ``i`` is
    removed. The weights that are kept do not move.

    An entry may be negative, away from a minimum or because it is an estimate, and counts by its
    absolute value. By its sign it would go first, which trusts the model where it is least to be
    trusted: with 64 probes, 42 % of the estimates for MLPNet's first layer are negative though no
    exact entry is, and at 50 % sparsity accuracy is 80 by sign and 94 by absolute value. (Published
    code subtracts the smallest score of each layer, which shifts layers against each other in a
    global ranking.)

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: Data, model and loss; every sample counts, whatever the mini-batch.
        probes: ``None`` computes the diagonal exactly, for at most 20,000 remaining weights; a
            number estimates it with as many random probes (Hutchinson), drawn from the
            calibration's seed.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.

    Raises:
        ArgumentError: If there are too many remaining weights for an exact diagonal.
        ArgumentTypeError: If there is no calibration.

    Cost: per remaining weight, or per probe, about two gradients of all calibration samples; see
    :func:`~torchprune_bayes.curvature.hessian_diagonal`.

    Example:
        >>> import torch
        >>> from torchprune_bayes import prune_global
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        >>> data = [(torch.tensor([[3.0, 1.0, 1.0]]), torch.zeros(1, 1))]
        >>> calibration = Calibration(layer, data, torch.nn.functional.mse_loss)
        >>> prune_global(None, HessianDiagonal, amount=1, calibration=calibration).scores["weight"]
        tensor([[9., 1., 4.]], dtype=torch.float64)
    """

    def __init__(
        self,
        amount: float | int,
        *,
        calibration: Calibration | None = None,
        probes: int | None = None,
        scope: str = "global",
    ) -> None:
        super().__init__(amount, calibration=calibration, scope=scope)
        if probes is not None:
            check_count("probes", probes)
        self.probes = probes

    def decide(self, space: ParameterSpace) -> Decision:
        """Rank the remaining entries of ``space`` by ``½ w_i² |H_ii|``."""
        weights, masks = space.values(), space.masks()
        diagonal = hessian_diagonal(
            self.required_calibration, probes=self.probes, weights=weights, masks=masks
        )
        target = Target(masks, self.amount, scope=self.scope)
        return obd_decision(target, weights, diagonal, probes=self.probes or "exact")
