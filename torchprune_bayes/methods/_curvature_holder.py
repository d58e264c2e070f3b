"""Methods that can be handed a curvature that was fitted before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Generic, Protocol, TypeVar

from torch import nn

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.methods.base import PruningMethod
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import ParameterPairs


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
        check_curvature_type(type(self).__name__, curvature, self.curvature_type)
        if calibration is None and curvature is not None:
            calibration = curvature.calibration
        super().__init__(amount, calibration=calibration, scope=scope)
        self.curvature = curvature

    def space_for(self, params: ParameterPairs | None) -> ParameterSpace:
        """The tensors to decide on; with a curvature and no data, those of ``params``.

        Raises:
            AlignmentError: If they are not the calibration's.
            ArgumentTypeError: If there are neither pairs nor a calibration.
        """
        if params is None or self.calibration is not None or self.curvature is None:
            return super().space_for(params)
        return ParameterSpace.of_pairs(params)

    def release(self) -> None:
        """Let go of model, data and curvature."""
        super().release()
        self.curvature = None

    def _space_of(self, module: nn.Module, name: str) -> ParameterSpace:
        if self.calibration is not None or self.curvature is None:
            return super()._space_of(module, name)
        return ParameterSpace.of_pairs([(module, name)])


def check_curvature_type(method: str, curvature: object, kind: type) -> None:
    """Refuse what is no fitted curvature of the kind that a method takes.

    Raises:
        ArgumentTypeError: In this case.
    """
    if curvature is not None and not isinstance(curvature, kind):
        hint = ": `structure` says what is to be fitted" if isinstance(curvature, str) else ""
        raise ArgumentTypeError(
            f"Expected `curvature` of {method} to be a fitted {kind.__name__}, got "
            f"{type(curvature).__name__}{hint}."
        )
