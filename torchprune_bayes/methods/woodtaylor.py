"""WoodTaylor: WoodFisher with the first-order term of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from torchprune_bayes._checks import check_fraction
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.methods._obs_step import Stage
from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.woodfisher import WoodFisher

GRADIENT_STEPS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)


@register(
    "woodtaylor",
    title="WoodFisher with the gradient: prunes and descends at once",
    paper="arXiv:2004.14340",
)
class WoodTaylor(WoodFisher):
    """Prune by the first- and second-order terms of the loss, for models that are not at a minimum.

    `WoodFisher (Singh and Alistarh, 2020), section on WoodTaylor
    <https://arxiv.org/abs/2004.14340>`_: minimising ``η ḡᵀδ + ½ δᵀFδ`` subject to ``δ_q = −w_q``
    gives ``ρ_q = (w_q − ηu_q)²/(2F⁻¹_qq)`` with ``u = F⁻¹ḡ``, up to a constant that the published
    code subtracts layer by layer. The kept weights take the optimal joint update, which
    contains a damped natural-gradient step ``η``. The local model does not hold for a full step, so
    ``η`` is found on held-out samples; scores then use ``η = 0``.

    Args:
        amount: Fraction or number of the remaining entries to prune.
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

    always_moves = True

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None = None,
        *,
        gradient_step: float | Literal["auto"] = "auto",
        **options: Any,
    ) -> None:
        super().__init__(amount, **options)
        if gradient_step != "auto":
            check_fraction("gradient_step", gradient_step)
        self.gradient_step = gradient_step
        steps = GRADIENT_STEPS if isinstance(gradient_step, str) else (float(gradient_step),)
        # The line search is over the gradient step; the compensation is applied fully.
        whole = self.tuning.scales[-1:]
        self.tuning = replace(self.tuning, gradient_steps=steps, scales=whole)
        self.procedure = replace(self.procedure, descends=steps != (0.0,))

    def score(self, stage: Stage) -> Tensor:
        """``(w_q − ηu_q)²/(2F⁻¹_qq)``, ``u = F⁻¹ḡ``; with ``η = 0`` where it is to be found."""
        if isinstance(self.gradient_step, str) or not self.gradient_step:
            return super().score(stage)
        descent = stage.fisher.solve(stage.fisher.mean_gradient())
        moved = wide(stage.weights) - self.gradient_step * descent
        return super().score(replace(stage, weights=moved)).to(stage.weights.dtype)
