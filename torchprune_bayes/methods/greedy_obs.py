"""Greedy exact OBS: weights are removed one by one from each block, with exact updates between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._numerics.fisher_blocks import InverseFisher
from torchprune_bayes._numerics.greedy import greedy_group_removals, greedy_removals
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.methods._obs_step import Stage
from torchprune_bayes.methods.registry import register
from torchprune_bayes.methods.woodfisher import WoodFisher


@register(
    "greedy-obs",
    title="exact optimal brain surgeon, one weight at a time in each block",
    paper="arXiv:2208.11580",
)
class GreedyOBS(WoodFisher):
    """Remove the cheapest weight of a block, update the rest exactly, and go on from there.

    The greedy solver of `OBC (Frantar and Alistarh, 2022) <https://arxiv.org/abs/2208.11580>`_ for
    blocks of the empirical Fisher. Each block is emptied once; the order and the costs of its
    removals, joined over all blocks, give the exact global threshold for any ``amount``. The
    survivors then take the joint update, which is what the single updates add up to. With
    ``pattern="N:M"`` a weight is passed over once its group has but ``N`` left; with ``"1xM"``
    whole groups are removed, at the cost ``½ w_gᵀ(F⁻¹_gg)⁻¹w_g``.

    Args:
        amount: Fraction (float) or number (int) of the remaining entries to prune; ``None`` with
            ``flops_target``, and with an N:M pattern.
        block_size: Blocks of the Fisher: an int, ``"tensor"`` or ``"full"``.
        options: As of :class:`~torchprune_bayes.WoodFisher`.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is neither calibration nor curvature.

    Cost per step: ``N`` gradients, ``2DB²`` multiplications and ``8DB`` bytes.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration, prune_global
        >>> model = torch.nn.Linear(8, 3)
        >>> data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(4)]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(None, GreedyOBS, amount=0.5, calibration=calibration)
        >>> int(decision.masks["weight"].sum())
        12
    """

    always_moves = True

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None = None,
        *,
        block_size: int | str = 256,
        **options: Any,
    ) -> None:
        super().__init__(amount, block_size=block_size, stages=1, **options)

    def score(self, stage: Stage) -> Tensor:
        """Largest cost of the removals up to that of each weight, float64 ``[D]``.

        In float64, because ties are broken in the last places.
        """
        weights, remaining, scores = wide(stage.weights), stage.remaining, []
        for where, inverse in stage.fisher.inverses():
            w, left = (v[where].unflatten(0, inverse.shape) for v in (weights, remaining))
            scores.append(self._removals(inverse, w, left).flatten())
        return self._per_cost(stage, torch.cat(scores))

    def _removals(self, inverse: InverseFisher, weights: Tensor, remaining: Tensor) -> Tensor:
        if self.pattern is None:
            return greedy_removals(inverse, weights, remaining=remaining).scores()
        size = self.pattern.size
        if self.pattern.takes_whole_groups:
            record = greedy_group_removals(inverse, weights, size)
            return record.scores().repeat_interleave(size, dim=-1)
        kept = self.pattern.kept
        return greedy_removals(inverse, weights, kept=kept, size=size, remaining=remaining).scores()
