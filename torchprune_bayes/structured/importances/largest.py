"""Importance by the largest weight of a unit, for units that a penalty has driven to zero."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_positive
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.importance import UnitImportance
from torchprune_bayes.structured.importances._calibrated import pieces_of

By = Literal["producer", "norm", "consumer", "any"]


class LargestWeightImportance(UnitImportance):
    """The largest absolute weight of the producers of a unit, of its norms, or of its readers.

    With ``shrink(..., target="evidence")`` every unit goes whose largest weight is below the
    threshold, and no more: what a penalty on whole rows has left, such as
    :func:`~torchprune_bayes.training.group_hoyer_square`; or units that were closed, whose scale
    and shift in their norms, or whose weights in all readers, are zero. A unit with zero weights in
    its readers, or zero scale and shift and an activation that keeps zero, does nothing, so that
    cutting it changes no output; one whose own row is small may still have a bias.

    Args:
        by: ``"producer"``: of the weights that make the unit, without biases, as the SNIP-it
            paper's code counts for DeepHoyer (its threshold is 1e-3). ``"norm"``: of scales and
            shifts. ``"consumer"``: of the weights that read it. ``"any"``: the smallest of the
            three, for units that were closed at one of these places; what makes a unit counts with
            its bias then, and only where no norm follows.
        threshold: Units below it are removed.

    Raises:
        ArgumentError: If an option has an impossible value.

    Cost: elementwise.

    Example:
        >>> from torchprune_bayes.structured import shrink
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     _ = model[2].weight[:, 1:3].zero_()
        >>> importance = LargestWeightImportance("consumer", threshold=1e-12)
        >>> report = shrink(model, torch.zeros(1, 3), importance, target="evidence")
        >>> model[0].out_features
        2
    """

    def __init__(self, by: By = "producer", threshold: float = 1e-3) -> None:
        super().__init__()
        check_choice("by", by, get_args(By))
        check_positive("threshold", threshold)
        self.by, self.threshold = by, threshold

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Score a group; ``None`` if it has nothing of the kind.

        Args:
            group: The group.
            model: The model that its names refer to.
        """
        if self.by != "any":
            return _largest(group, model, self.by, biases=self.by == "norm")
        norms = _largest(group, model, "norm", biases=True)
        made = _largest(group, model, "producer", biases=True) if norms is None else norms
        read = _largest(group, model, "consumer", biases=False)
        result = [score for score in (made, read) if score is not None]
        return torch.stack(result).amin(0) if result else None


def _largest(group: UnitGroup, model: nn.Module, role: str, *, biases: bool) -> Tensor | None:
    """Largest absolute value of each unit over all pieces in a role, float64 ``[units]``."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = []
    for piece in pieces_of(group, role):
        tensor = parameters.get(piece.name)  # statistics of norms are buffers
        if tensor is None or (tensor.dim() < 2 and not biases):
            continue
        lines = tensor.detach().abs().movedim(piece.dim, 0).reshape(tensor.shape[piece.dim], -1)
        largest = wide(lines.amax(1))
        result.append(largest[piece.positions.to(largest.device)].amax(1))
    return torch.stack(result).amax(0) if result else None
