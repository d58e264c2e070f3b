"""Methods that can be handed a curvature that was fitted before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Generic, Protocol, TypeVar

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.methods.base import PruningMethod


class FittedCurvature(Protocol):
    """A curvature that may know which calibration it was fitted to."""

    calibration: Calibration | None


Curvature = TypeVar("Curvature", bound=FittedCurvature)


class CurvatureHolder(PruningMethod, Generic[Curvature]):
    """A method with ``calibration=``, ``curvature=`` or both; the curvature's calibration counts.

    Args:
        amount: As of :class:`PruningMethod`.
        calibration: Data, model and loss; by default the curvature's.
        curvature: A curvature fitted already.
        scope: As of :class:`PruningMethod`.

    Raises:
        ArgumentTypeError: If the curvature is not of the kind that the method takes.
    """

    curvature_type: ClassVar[type] = EmpiricalFisher

    def __init__(
        self,
        amount: float | int | Mapping[str, int],
        *,
        calibration: Calibration | None = None,
        curvature: Curvature | None = None,
        scope: str = "global",
    ) -> None:
        _check_type(type(self).__name__, curvature, self.curvature_type)
        if calibration is None and curvature is not None:
            calibration = curvature.calibration
        super().__init__(amount, calibration=calibration, scope=scope)
        self.curvature = curvature

    def release(self) -> None:
        """Let go of model, data and curvature."""
        super().release()
        self.curvature = None


def _check_type(method: str, curvature: object, kind: type) -> None:
    if curvature is not None and not isinstance(curvature, kind):
        raise ArgumentTypeError(
            f"Expected `curvature` of {method} to be a fitted {kind.__name__}, got "
            f"{type(curvature).__name__}."
        )
