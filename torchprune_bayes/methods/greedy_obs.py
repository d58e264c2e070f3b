"""Greedy exact OBS: weights are removed one by one from each block, with exact updates between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._numerics.greedy import greedy_removals
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.methods._obs import ObsPruning
from torchprune_bayes.methods._target import Target
from torchprune_bayes.methods.registry import register
from torchprune_bayes.types import Scores


@register(
    "greedy-obs",
    title="exact optimal brain surgeon, one weight at a time in each block",
    paper="arXiv:2208.11580",
)
class GreedyOBS(ObsPruning):
    """Remove the cheapest weight of a block, update the rest exactly, and go on from there.

    The greedy solver of `OBC (Frantar and Alistarh, 2022) <https://arxiv.org/abs/2208.11580>`_ for
    blocks of the empirical Fisher. Each block is emptied once; the order and the costs of its
    removals, joined over all blocks, give the exact global threshold for any ``amount``. The
    survivors then take the joint update, which is what the single updates add up to.

    Args:
        amount: Fraction (float) or number (int) of the live entries to prune; ``None`` with
            ``flops_target``.
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

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None,
        *,
        block_size: int | str = 256,
        **options: Any,
    ) -> None:
        super().__init__(amount, block_size=block_size, stages=1, **options)  # type: ignore[arg-type]

    def _ranked(
        self, fisher: EmpiricalFisher, weights: dict[str, Tensor], target: Target
    ) -> Scores:
        flat = fisher.live.gather(weights)
        parts = [
            greedy_removals(inverse, flat[where].unflatten(0, inverse.shape)).scores().flatten()
            for where, inverse in fisher.inverses()
        ]
        return fisher.live.scatter(torch.cat(parts))
