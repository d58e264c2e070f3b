"""FORCE: pruning in steps in which weights may return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.sensitivity import (
    SensitivityPruning,
    absolute,
    masked,
    sensitivities,
)
from torchprune_bayes.types import Masks, Scores


@register("force", title="sensitivity after pruning, with regrowth", paper="arXiv:2006.09081")
class FORCE(SensitivityPruning):
    """Keep the weights that matter to the pruned network: the largest ``|w ∂L/∂w̄|`` at ``w̄ = m⊙w``.

    `FORCE (de Jorge et al., 2020) <https://arxiv.org/abs/2006.09081>`_ maximises the sensitivity
    of the weights *after* pruning. In each of ``T`` steps the gradient is taken at the masked
    weights ``w̄``, by every weight, and multiplied by the dense ``w``. So a weight that was
    pruned in an earlier step may return; a share ``ρ^{t/T}`` is kept after step ``t``. What was
    pruned before the call never returns.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: Data, model and loss. Each step takes another draw.
        steps: ``T``.
        path: ``"geometric"``, the paper's; ``"linear"`` or ``"cubic"``.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.
        min_keep_per_tensor: Remaining entries that each tensor keeps as far as the count allows.
        batch_norm: ``"running"`` or ``"batch"``, what batch norms normalise by while scoring; see
            :class:`~torchprune_bayes.methods.SNIPit`.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is no calibration.

    Cost: ``T`` gradients of the mean loss; three copies of the weights.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration, prune_global
        >>> model = torch.nn.Linear(16, 4)
        >>> data = [(torch.randn(8, 16), torch.randint(4, (8,)))]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(None, FORCE, amount=0.75, calibration=calibration, steps=2)
        >>> [step["kept"] for step in decision.info["steps"]]
        [32, 16]
    """

    regrows = True

    def __init__(
        self, amount: float | int | Mapping[str, int], *, steps: int = 60, **options: Any
    ) -> None:
        super().__init__(amount, steps=steps, **options)

    def score(self, step: int, weights: Mapping[str, Tensor], masks: Masks) -> Scores:
        """``|w ∂L/∂w̄|``, with the gradient at the remaining weights."""
        calibration = self.required_calibration.redrawn(step)
        return absolute(sensitivities(calibration, weights, at=masked(weights, masks)))
