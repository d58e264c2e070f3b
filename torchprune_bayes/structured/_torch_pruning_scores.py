"""Scores in the form for torch-pruning's regularising pruners."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_DEPTH = 6  # frames between the question and the importance: estimate_importance, __call__


def asked_by_regulariser() -> bool:
    """Whether the scores are for a pruner's ``regularize`` rather than for its ranking.

    The two need different results for a group to skip, NaN and ``None``, but call in
    the same way; so this inspects the caller.
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        name = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "regularize" and name.partition(".")[0] == "torch_pruning":
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def for_regulariser(scores: Tensor | None, units: int) -> Tensor:
    """Scores whose square roots can be scaled to [0, 1], or NaN for a group to skip.

    ``GroupNormPruner`` takes roots, subtracts them from the largest and divides by their range. So
    scores of any sign are moved to begin at zero; where there are none, or they are all the same or
    not finite, nothing can be ranked, and NaN is what it skips.

    Args:
        scores: ``[units]`` or ``None``.
        units: Their number.

    Example:
        >>> for_regulariser(torch.tensor([-1.0, 2.0]), 2)
        tensor([0., 3.])
        >>> for_regulariser(None, 2)
        tensor([nan, nan])
    """
    if scores is None or not scores.isfinite().all() or scores.max() == scores.min():
        return torch.full((units,), torch.nan)
    return scores - scores.min().clamp_max(0)
