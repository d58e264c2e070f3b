"""SNIP-it: pruning by the elasticity of the loss, in steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import nll_loss

from torchprune_bayes._checks import check_choice
from torchprune_bayes._numerics.selection import keep_strictly_above
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.sensitivity import (
    SensitivityPruning,
    absolute,
    masked,
    mean_loss,
    sensitivities,
)
from torchprune_bayes.methods.stepwise import RankedGroup
from torchprune_bayes.types import Masks, Scores

_EPSILON = 1e-8  # the published code's, against a loss of zero


@register("snip-it", title="elasticity of the loss, in steps", paper="arXiv:2006.00896")
class SNIPit(SensitivityPruning):
    """Prune the weights with the smallest elasticity ``|∂L/∂c · c/L| = |w ∂L/∂w| / |L|``, in steps.

    `SNIP-it (Verdenius, Stol and Forré, 2020) <https://arxiv.org/abs/2006.00896>`_: the elasticity
    is the relative change of the loss ``L`` for a relative change of a gate ``c = 1`` on the
    weight. With the target sparsity ``κ`` it is computed ``S + 2`` times, each time on what is
    left and on another draw of the data, and pruned to ``k_i = κ − (κ − 0.5)·2^{−i}`` for
    ``i = 0, ..., S`` and then to ``κ``. Pruned weights do not return, and kept weights do not move.
    A target of at most ``start`` takes one step.

    The paper prunes before training, or while training. The latter is a
    :class:`~torchprune_bayes.training.GradualPruner` with the schedule
    :func:`~torchprune_bayes.schedules.halving` and ``steps=0``, which is one ranking per event.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune; ``κ`` is the
            sparsity that results, of all entries.
        calibration: Data, model and loss. The paper takes 2560 samples.
        steps: ``S``, how often the missing sparsity is halved.
        path: ``"halving"``, the paper's; or ``"geometric"``, ``"linear"`` or ``"cubic"`` in
            ``steps`` steps.
        start: First sparsity of the paper's path.
        scope: ``"global"`` ranks all tensors together, ``"layer"`` prunes each to ``amount``.
        min_keep_per_tensor: Remaining entries that each tensor keeps as far as the count allows. At
            high sparsity a global ranking may else empty a layer, and with it the network.
        batch_norm: Statistics of batch norms while scoring. ``"running"``, as in the published
            code: their running statistics. Before training these are mean 0 and variance 1, so
            that nothing is normalised, unless ``torch.optim.swa_utils.update_bn`` has filled them.
            ``"batch"``: the batch, as in training, with gradients through its statistics. Batches
            are those of the data, cut at every 512th sample; all else stays in evaluation mode.
        compat: ``"paper"`` takes over the published code's threshold, which prunes an entry more
            and all ties, and its loss, the negative mean logit of the right class; the floor per
            tensor is off.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is no calibration.

    Cost: ``S + 2`` gradients of the mean loss and one evaluation of it; three copies of the
    weights.

    Example:
        >>> import torch
        >>> from torch.nn.utils import prune
        >>> from torchprune_bayes import Calibration, prunable_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 50), torch.nn.Linear(50, 2))
        >>> data = [(torch.randn(32, 8), torch.randint(2, (32,)))]
        >>> params = prunable_parameters(model)
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy, params)
        >>> prune.global_unstructured(
        ...     params, pruning_method=SNIPit, amount=0.98, calibration=calibration
        ... )
        >>> sum(int((module.weight != 0).sum()) for module, _ in params)
        10
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        calibration: Calibration | None = None,
        steps: int = 5,
        path: str = "halving",
        start: float = 0.5,
        scope: str = "global",
        min_keep_per_tensor: int = 1,
        batch_norm: str = "running",
        compat: str | None = None,
    ) -> None:
        super().__init__(
            amount,
            calibration=calibration,
            scope=scope,
            steps=steps,
            path=path,
            start=start,
            min_keep_per_tensor=min_keep_per_tensor,
            batch_norm=batch_norm,
        )
        check_choice("compat", compat, (None, "paper"))
        self.compat = compat

    def score(self, step: int, weights: Mapping[str, Tensor], masks: Masks) -> Scores:
        """``|w ∂L/∂w|`` of what is left; ``1/|L|`` is one constant and changes no ranking."""
        left = masked(weights, masks)
        return absolute(sensitivities(self._calibration_of(step), left))

    def scaled(
        self, scores: Scores, step: int, weights: Mapping[str, Tensor], masks: Masks
    ) -> Scores:
        """The elasticities ``|w ∂L/∂w| / |L|``."""
        loss = mean_loss(self._calibration_of(step), masked(weights, masks))
        return absolute(scores, unit=abs(loss + _EPSILON))

    def _calibration_of(self, step: int) -> Calibration:
        calibration = self.required_calibration.redrawn(step)
        return calibration.with_loss(_negative_logit) if self.compat == "paper" else calibration

    def _keep(
        self, group: RankedGroup, step: int, done: int, scores: Scores, pool: Masks
    ) -> list[Tensor]:
        if self.compat != "paper":
            return super()._keep(group, step, done, scores, pool)
        kept = min(max(int(group.entries * (1.0 - group.sparsities[step])), 1), group.entries)
        # The threshold is the `kept`-th largest score; half an entry keeps rounding away from it.
        sparsity = 1.0 - (kept - 0.5) / group.entries
        ranked, remaining = ([tensors[name] for name in group.names] for tensors in (scores, pool))
        return keep_strictly_above(ranked, sparsity, remaining)


def _negative_logit(output: Any, target: Tensor) -> Tensor:
    return nll_loss(output, target)
