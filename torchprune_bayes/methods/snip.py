"""SNIP, at once and in steps: pruning by the sensitivity of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.sensitivity import (
    SensitivityPruning,
    absolute,
    masked,
    sensitivities,
)
from torchprune_bayes.types import Masks, Scores


@register("iterative-snip", title="sensitivity of the loss, in steps", paper="arXiv:2006.09081")
class IterativeSNIP(SensitivityPruning):
    """Prune the weights with the smallest ``|w ∂L/∂w|``, in steps that keep a fixed share.

    Iterative SNIP (`de Jorge et al., 2020 <https://arxiv.org/abs/2006.09081>`_, section 5): with a
    share ``ρ`` of the weights to keep, ``ρ^{t/T}`` are left after step ``t`` of ``T``. The
    sensitivities are those of the remaining weights, each time on another draw of the data.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: Data, model and loss.
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
        >>> decision = prune_global(
        ...     None, IterativeSNIP, amount=0.9375, calibration=calibration, steps=4
        ... )
        >>> [step["kept"] for step in decision.info["steps"]]
        [32, 16, 8, 4]
    """

    def __init__(
        self, amount: float | int | Mapping[str, int], *, steps: int = 60, **options: Any
    ) -> None:
        super().__init__(amount, steps=steps, **options)

    def score(self, step: int, weights: Mapping[str, Tensor], masks: Masks) -> Scores:
        """``|w ∂L/∂w|`` of what is left."""
        left = masked(weights, masks)
        return absolute(sensitivities(self.required_calibration.redrawn(step), left))

    def scaled(
        self, scores: Scores, step: int, weights: Mapping[str, Tensor], masks: Masks
    ) -> Scores:
        """Shares of the sum of all scores, as the SNIP paper shows them."""
        total = sum(float(score.sum(dtype=torch.float64)) for score in scores.values())
        return absolute(scores, unit=total or 1.0)


@register("snip", title="sensitivity of the loss", paper="arXiv:1810.02340")
class SNIP(IterativeSNIP):
    """Prune the weights with the smallest ``|∂L/∂c| = |w ∂L/∂w|``, all at once.

    `SNIP (Lee, Ajanthan and Torr, 2019) <https://arxiv.org/abs/1810.02340>`_: the connection
    sensitivity is the derivative of the mean loss by a gate ``c = 1`` on the weight, shown as its
    share of the sum over all weights.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune.
        calibration: Data, model and loss.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.
        min_keep_per_tensor: Remaining entries that each tensor keeps as far as the count allows.
        batch_norm: ``"running"`` or ``"batch"``, what batch norms normalise by while scoring; see
            :class:`~torchprune_bayes.methods.SNIPit`.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is no calibration.

    Cost: one gradient of the mean loss; three copies of the weights.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration, prune_global
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        >>> data = [(torch.tensor([[3.0, 1.0, 1.0]]), torch.zeros(1, 1))]
        >>> calibration = Calibration(layer, data, torch.nn.functional.mse_loss)
        >>> prune_global(None, SNIP, amount=1, calibration=calibration).scores["weight"]
        tensor([[0.5000, 0.1667, 0.3333]])
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        calibration: Calibration | None = None,
        scope: str = "global",
        min_keep_per_tensor: int = 0,
        batch_norm: str = "running",
    ) -> None:
        super().__init__(
            amount,
            calibration=calibration,
            steps=1,
            scope=scope,
            min_keep_per_tensor=min_keep_per_tensor,
            batch_norm=batch_norm,
        )
