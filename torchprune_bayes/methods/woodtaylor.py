"""WoodTaylor: WoodFisher with the first-order term of the loss."""

from __future__ import annotations

from torch import Tensor

from torchprune_bayes._numerics.fisher_blocks import InverseFisher
from torchprune_bayes.methods._first_order import FirstOrderPruning
from torchprune_bayes.methods.registry import register


@register(
    "woodtaylor",
    title="WoodFisher with the gradient: prunes and descends at once",
    paper="arXiv:2004.14340",
)
class WoodTaylor(FirstOrderPruning):
    """Prune by the first- and second-order terms of the loss, for models that are not at a minimum.

    `WoodFisher (Singh and Alistarh, 2020), section on WoodTaylor
    <https://arxiv.org/abs/2004.14340>`_: minimising ``η ḡᵀδ + ½ δᵀFδ`` subject to ``δ_q = −w_q``
    gives ``ρ_q = (w_q − ηu_q)²/(2F⁻¹_qq)`` with ``u = F⁻¹ḡ``, up to a constant that the published
    code subtracts layer by layer. The survivors take the optimal joint update, which contains a
    damped natural-gradient step ``η``. The local model does not hold for a full step, so ``η`` is
    found on held-out samples; scores then use ``η = 0``.

    Args:
        amount: Fraction or number of the live entries to prune.
        gradient_step: ``η``, or ``"auto"``, a line search on held-out loss.
        options: As of :class:`~torchprune_bayes.WoodFisher`.

    Raises:
        ArgumentError: If an option has an impossible value.

    Cost: That of :class:`~torchprune_bayes.WoodFisher`, and two to eight forward passes over
    held-out samples per damping for the line search.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration, WoodTaylor, prune_global
        >>> model = torch.nn.Linear(8, 3)
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(None, WoodTaylor, amount=0.5, calibration=calibration, steps=4)
        >>> len(decision.info["steps"])
        4
    """

    gradient_grid = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)

    def scores(self, inverse: InverseFisher, weights: Tensor, alive: Tensor) -> Tensor:
        """As :meth:`ObsPruning.scores` with ``w − ηu`` in the place of ``w``."""
        if not isinstance(self.gradient_step, str):
            descent = inverse.solve(inverse.gradients.double().mean(-2))
            weights = weights - self.gradient_step * descent
        return super().scores(inverse, weights, alive)

    def _scales(self) -> tuple[float, ...]:
        # The line search is over the gradient step; the compensation is taken whole.
        return (1.0,) if self.update_scale == "auto" else super()._scales()
