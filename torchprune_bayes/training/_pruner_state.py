"""The plan and the saved state of a pruner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchprune_bayes._checks import check_count, check_keys
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Masks


@dataclass(frozen=True)
class PlannedPruning:
    """Plan of a pruner's step; nothing has been changed yet.

    Attributes:
        step: Number of the step.
        masks: New masks by qualified name, of the tensors of which some are pruned.
        updates: New values of these tensors, if the method moves weights.
        info: What the method reported, for each group of tensors.
    """

    step: int
    masks: Masks = field(default_factory=dict)
    updates: dict[str, Tensor] | None = None
    info: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class PrunerState:
    """Step, history and masks of a pruner, checked for type and shape."""

    step: int
    history: list[dict[str, Any]]
    masks: Masks

    @classmethod
    def of(cls, state: Any, space: ParameterSpace) -> PrunerState:
        """Check a saved state and move its masks to the tensors' devices.

        Raises:
            AlignmentError: If a mask belongs to no tensor or has another shape.
            ArgumentError: If ``state`` is not a pruner's state.
            ArgumentTypeError: If the step is no int.
        """
        check_keys("a pruner's state", state, {"step", "history", "masks"})
        check_count("step", state["step"], minimum=0)
        history, masks = state["history"], state["masks"]
        check_history(history)
        placed = checked_masks(masks, space)
        return cls(int(state["step"]), [dict(event) for event in history], placed)


def checked_masks(masks: Any, space: ParameterSpace) -> Masks:
    """Saved masks, as boolean tensors on the tensors' devices.

    Raises:
        AlignmentError: If a mask belongs to no tensor or has another shape.
        ArgumentError: If they are not masks by name, or one is not a mask of zeros and ones.
    """
    if not isinstance(masks, Mapping):
        raise ArgumentError(f"Expected masks by name, got {type(masks).__name__}.")
    placed = {tensor.name: tensor.leaf for tensor in space.subset(list(masks))}
    for name, leaf in placed.items():
        _check_mask(name, leaf, masks[name])
    return {name: masks[name].to(leaf.device).bool() for name, leaf in placed.items()}


def _check_mask(name: str, leaf: Tensor, mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise ArgumentError(f"Expected a mask for `{name}`, got {type(mask).__name__}.")
    if mask.shape != leaf.shape:
        raise AlignmentError(
            f"Expected a mask of shape {tuple(leaf.shape)} for `{name}`, got {tuple(mask.shape)}."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ArgumentError(f"Expected a mask of zeros and ones for `{name}`, got other values.")


def check_history(history: Any) -> None:
    """Refuse what is no list of events.

    Raises:
        ArgumentError: If it is not.
    """
    is_list = isinstance(history, (list, tuple))
    if not is_list or not all(isinstance(event, Mapping) for event in history):
        raise ArgumentError(f"Expected a list of events as history, got {history!r:.80}.")
