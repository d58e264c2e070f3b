"""The base class of structured importances, for ``shrink`` and for torch-pruning's own pruners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchprune_bayes.structured.groups import Kept, UnitGroup

if TYPE_CHECKING:
    _HostImportance = ABC
else:
    try:
        from torch_pruning.pruner.importance import Importance as _HostImportance
    except ImportError:  # known families are shrunk without torch-pruning
        _HostImportance = ABC


class UnitImportance(_HostImportance):
    """Scores the importance of each unit of a group; the least important are removed first.

    Subclasses write :meth:`score`. Instances are given to
    :func:`~torchprune_bayes.structured.shrink`, or to torch-pruning as
    ``tp.pruner.BasePruner(model, example_inputs, importance=...)``.

    Attributes:
        threshold: Scores below it mean removal whatever the sparsity; zero for evidences,
            ``None`` where scores have no absolute meaning.
        joint: Whether a score estimates what the loss, or the evidence, loses with the unit as a
            whole, in the same measure for units of any kind. Such scores are divided by what the
            unit costs, in the resource that a sparsity counts.
        needs_recalibration: Whether :meth:`prepare` must see the model again after every step of
            shrinking, rather than once before the first.

    Example:
        >>> class RowNorm(UnitImportance):
        ...     def score(self, group, model):
        ...         producer = next(piece for piece in group.slices if piece.role == "producer")
        ...         rows = model.get_parameter(producer.name).detach()[producer.positions[:, 0]]
        ...         return rows.flatten(1).norm(dim=1)
    """

    threshold: float | None = None
    joint: bool = False
    needs_recalibration: bool = False

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Gather what the scores need; the model must not be changed.

        Args:
            model: The model, without wrappers.
            groups: All groups that will be scored.
        """
        return

    @abstractmethod
    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Score the units of a group.

        Args:
            group: The group.
            model: The model that its names refer to.

        Returns:
            Floating point tensor of shape (units,), without NaN; ``None`` leaves the group whole.
        """

    def update(
        self, model: nn.Module, groups: Sequence[UnitGroup], kept: Kept
    ) -> dict[str, Tensor] | None:
        """Return new values for remaining entries, to compensate for the removal.

        Args:
            model: The model before the cut.
            groups: All groups.
            kept: The units that stay.

        Returns:
            Values by first qualified name with the shapes before the cut, or ``None`` for none.
        """
        return None

    def __call__(self, group: Any) -> Tensor | None:
        """Score a group of torch-pruning's.

        Args:
            group: A ``torch_pruning.dependency.Group``.

        Returns:
            One score for each of ``group[0].idxs``, in their order; ``None`` where the group cannot
            be split into units or :meth:`score` returns ``None``; torch-pruning skips it.
            For the regularising pruners see
            :func:`~torchprune_bayes.structured._torch_pruning_scores.for_regulariser`.
        """
        from torchprune_bayes.structured import _torch_pruning_scores
        from torchprune_bayes.structured.tracing import unit_group

        model = group._DG.model
        converted = unit_group(group, model)
        scores = None if converted is None else self.score_of(group, converted, model)
        if _torch_pruning_scores.asked_by_regulariser():
            return _torch_pruning_scores.for_regulariser(scores, len(group[0].idxs))
        return scores

    def score_of(self, group: Any, converted: UnitGroup, model: nn.Module) -> Tensor | None:
        """Score a group of torch-pruning's that was converted; :meth:`score` unless overridden."""
        return self.score(converted, model)
