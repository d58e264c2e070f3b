"""Torch-pruning's own importances, for ``shrink``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentTypeError, ParameterError
from torchprune_bayes.structured._forward import ForwardFunction
from torchprune_bayes.structured._host_groups import unit_group
from torchprune_bayes.structured._host_tracing import trace
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.importance import UnitImportance


class HostImportance(UnitImportance):
    """Lets an importance of torch-pruning's score the host's groups, which it knows how to read.

    Args:
        importance: Called with a ``torch_pruning.dependency.Group``. Its weights and ``.grad`` are
            those of the model.
        example_inputs: What the model is traced with.
        forward_fn: How to call it otherwise.
        timeout_seconds: Limit of the search for coupled layers.
    """

    needs_recalibration = True

    def __init__(
        self,
        importance: Callable[[Any], Any],
        example_inputs: Any,
        forward_fn: ForwardFunction | None = None,
        timeout_seconds: float = 60.0,
    ) -> None:
        self._importance = importance
        self._tracing = (example_inputs, forward_fn, timeout_seconds)
        self._groups: dict[str, Any] = {}

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Trace the model as it is now."""
        traced = trace(model, *self._tracing)
        converted = ((unit_group(group, traced.model), group) for group in traced.groups())
        self._groups = {ours.name: group for ours, group in converted if ours is not None}
        missing = [group.name for group in groups if group.name not in self._groups]
        if missing:
            raise ParameterError(
                f"Expected groups that torch-pruning finds for an importance of its own, got "
                f"`{missing[0]}`: use an importance of this library."
            )

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Score a group as the host would."""
        scores = self._importance(self._groups[group.name])
        return scores if isinstance(scores, Tensor) and scores.dim() == 1 else None


def as_unit_importance(
    importance: Any, example_inputs: Any, forward_fn: ForwardFunction | None
) -> UnitImportance:
    """Return an importance of this library as it is, and wrap one of torch-pruning's.

    Raises:
        ArgumentTypeError: If it is neither.
    """
    if isinstance(importance, UnitImportance):
        return importance
    if isinstance(importance, type) or not callable(importance):
        raise ArgumentTypeError(
            "Expected `importance` to be a UnitImportance or an importance of torch-pruning, got "
            f"{importance!r}."
        )
    return HostImportance(importance, example_inputs, forward_fn)
