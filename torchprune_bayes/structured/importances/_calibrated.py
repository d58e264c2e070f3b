"""Base of importances that take gradients from a calibration of the scored model."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentTypeError
from torchprune_bayes.structured._space import space_of
from torchprune_bayes.structured._torch_pruning_groups import unit_group
from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
from torchprune_bayes.structured.importance import UnitImportance

__all__ = ["CalibratedImportance", "gate_pieces", "pieces_of", "space_of", "sums_along"]


class CalibratedImportance(UnitImportance):
    """Scores of all groups at once, computed again whenever the model has changed.

    Subclasses write :meth:`measure`. Each time uses a new draw of the samples. In
    torch-pruning's pruners, which announce no step, the scores are taken when a first group asks
    for its own, and again when weights of the model have moved or were cut since.

    Args:
        calibration: Data, model and loss; its own list of parameters does not matter.

    Raises:
        ArgumentTypeError: If it is not a calibration.
    """

    needs_recalibration = True

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        if not isinstance(calibration, Calibration):
            raise ArgumentTypeError(f"Expected a Calibration, got {type(calibration).__name__}.")
        self.calibration = calibration
        self._draws = 0
        self._scores: dict[str, Tensor | None] = {}
        self._versions: Versions | None = None

    @abstractmethod
    def measure(self, calibration: Calibration, groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
        """Score groups that something reads.

        Args:
            calibration: Data with the draw of this time.
            groups: The groups, of the calibration's present model.

        Returns:
            ``[units]`` by the name of the group; a missing group is left whole.
        """

    def prepare(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        """Score all groups on the present model.

        Raises:
            AlignmentError: If the model is not the one of the calibration.
            CalibrationError: If the data gives no usable gradients.
        """
        check_model(model, self.calibration)
        inner = [group for group in groups if self._measured(group)]
        result = self.measure(self.calibration.redrawn(self._draws), inner) if inner else {}
        self._scores = {group.name: result.get(group.name) for group in groups}
        self._draws += 1
        self._versions = Versions(model)

    def score(self, group: UnitGroup, model: nn.Module) -> Tensor | None:
        """Return the scores of a group; ``None`` if nothing reads it, as the model's outputs."""
        if not self._measured(group):
            return None
        if self._is_stale(group, model):
            self.prepare(model, [group])
        return self._scores.get(group.name)

    def score_of(self, group: Any, converted: UnitGroup, model: nn.Module) -> Tensor | None:
        """Score a group of torch-pruning's; the first one has all others scored with it."""
        if self._measured(converted) and self._is_stale(converted, model):
            self.prepare(model, all_groups(group, converted, model))
        return self.score(converted, model)

    def _measured(self, group: UnitGroup) -> bool:
        """Whether there is something to score: what reads the units."""
        return bool(pieces_of(group, "consumer"))

    def _is_stale(self, group: UnitGroup, model: nn.Module) -> bool:
        """Whether these units were not scored, or the model has changed since."""
        held = self._scores.get(group.name)
        if group.name not in self._scores or (held is not None and len(held) != group.units):
            return True
        return self._versions is None or self._versions.changed(model)


def all_groups(group: Any, converted: UnitGroup, model: nn.Module) -> list[UnitGroup]:
    """All groups of torch-pruning's that can be converted, with this one as it was converted."""
    everything = (unit_group(each, model) for each in group._DG.get_all_groups())
    result = {each.name: each for each in everything if each is not None}
    return [*(result | {converted.name: converted}).values()]


class Versions:
    """The weights of a model at one time, to detect whether they have changed or were cut."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = [(weakref.ref(p), p._version) for p in model.parameters()]

    def changed(self, model: nn.Module) -> bool:
        """Whether one was written to or replaced since."""
        present = list(model.parameters())
        return len(present) != len(self._seen) or any(
            reference() is not parameter or parameter._version != version
            for parameter, (reference, version) in zip(present, self._seen, strict=True)
        )


def check_model(model: nn.Module, calibration: Calibration) -> None:
    """Refuse another model than the calibration's.

    Raises:
        AlignmentError: In this case.
    """
    if model is not calibration.model:
        raise AlignmentError(
            "Expected the model of the calibration, without wrappers, got another one: unwrap "
            "it before building the calibration."
        )


def pieces_of(group: UnitGroup, *roles: str) -> list[UnitSlice]:
    """Return what a group owns in these roles."""
    return [piece for piece in group.slices if piece.role in roles]


def gate_pieces(group: UnitGroup, role: str = "consumer") -> list[tuple[UnitSlice, float]]:
    """Return the slices that carry gates on the units, with the weight of each derivative.

    Args:
        group: The units.
        role: Role of the slices. The default, all readers of the units, also includes half of the
            queries and half of the keys, whose dimensions no layer reads.
    """
    unread = group.unread if role == "consumer" else ()
    return [(p, 1.0) for p in pieces_of(group, role)] + [(piece, 0.5) for piece in unread]


def sums_along(values: Tensor, piece: UnitSlice) -> Tensor:
    """Sum a tensor over the entries that each unit owns: float64 ``[units]``."""
    lines = wide(values)
    along = lines.movedim(piece.dim, 0).flatten(1).sum(1) if values.ndim > 1 else lines
    return along[piece.positions.to(along.device)].sum(1)
