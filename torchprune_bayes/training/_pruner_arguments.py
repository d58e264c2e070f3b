"""Checks of a pruner's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.params import ParameterSpace, prunable_parameters
from torchprune_bayes.types import ParameterPairs


def space_of(
    params: ParameterPairs | nn.Module | None, calibration: Calibration | None
) -> ParameterSpace:
    """The tensors that a pruner works on.

    Raises:
        AlignmentError: If ``params`` are not the calibration's.
        ArgumentTypeError: If neither is given.
    """
    if calibration is None:
        if params is None:
            raise ArgumentTypeError("Expected `params` or `calibration=`, got neither.")
        if isinstance(params, nn.Module):
            return ParameterSpace(params)
        return ParameterSpace.of_pairs(params)
    if params is not None:
        pairs = prunable_parameters(params) if isinstance(params, nn.Module) else params
        calibration.space.check_same_tensors(pairs)
    return calibration.space


def check_options(method: type[BasePruningMethod], options: Mapping[str, Any]) -> None:
    """Refuse options that the pruner sets itself, and a FLOP target for a method without one.

    Raises:
        ArgumentError: In this case.
    """
    for name, reason in (("amount", "the schedule gives it"), ("curvature", "it is fitted anew")):
        if name in options:
            raise ArgumentError(f"Expected no `{name}`, because {reason}, got one.")
    if "flops_target" in options and "flops_target" not in signature(method.__init__).parameters:
        raise ArgumentError(
            f"Expected a method that takes `flops_target`, such as woodfisher, got "
            f"{method.__name__}."
        )
