"""Verification that a shrunk model equals the whole one with the same units zeroed.

In plain words: the check runs on a copy of the model in single precision, or double where that
does not decide, with noise on the weights, so that neither low precision nor scales that start
at zero hide wrong wiring. It runs twice, with different inputs and weights the second time; a
convolutional model that runs the same operations on smaller images is compared on these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError, NumericalError
from torchprune_bayes.structured._twin import TOLERANCES, Twin
from torchprune_bayes.structured.slicing import ShrinkPlan, plan_of
from torchprune_bayes.wiring.forward import ForwardFunction, first_line
from torchprune_bayes.wiring.groups import UnitGroup

_CHANGED = "without some of its units the others change"


def check_equal(
    model: nn.Module,
    plan: ShrinkPlan,
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
    operations: Sequence[str] = (),
) -> float:
    """Return the largest difference, relative to the largest output, that a cut makes.

    Args:
        model: The model before the cut, without wrappers; it is copied.
        plan: The plan of the cut.
        example_inputs: What the model is called with.
        forward_fn: How to call it otherwise.
        operations: What runs on the example inputs, if it is known; allows smaller images.

    Raises:
        ArgumentError: If there is nothing to compare, as with empty or NaN outputs.
        ParameterError: If the model cannot be copied or the shrunk one does not run.
        NumericalError: If rounding cannot explain the difference.

    Cost: a copy of the model and four forward passes.
    """
    result = 0.0
    for dtype in dtypes_for(model):
        twin = Twin(model, example_inputs, forward_fn, dtype, operations=operations)
        result = _largest(twin, plan)
        if result <= TOLERANCES[dtype]:
            return result
    raise NumericalError(
        "Expected the shrunk model to compute what the whole one computes with the same units "
        f"zeroed, got a difference of {result:.3g} of the largest output where at most "
        f"{TOLERANCES[dtype]:.3g} can be rounding: its wiring is not understood, and the model is "
        "left as it was."
    )


def _largest(twin: Twin, plan: ShrinkPlan) -> float:
    """The largest difference over two inputs, with weights that are moved on for the second.

    Raises:
        ArgumentError: If there is nothing to compare on the first.
    """
    first, compared = twin.difference(plan, put_back=False)
    if not compared:
        raise ArgumentError(
            "Expected outputs to compare, got none that are finite: give example inputs on "
            "which the model computes something, or pass `verify=False`."
        )
    if first > TOLERANCES[twin.dtype]:
        return first
    twin.move(1)
    return max(first, twin.difference(plan, put_back=False)[0])


def dtypes_for(model: nn.Module) -> list[torch.dtype]:
    """Return the types to compare in, the cheaper one first."""
    kinds = {tensor.dtype for tensor in model.parameters()}
    return [torch.float64] if torch.float64 in kinds else [torch.float32, torch.float64]


def failing_groups(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
    operations: Sequence[str] = (),
) -> dict[str, str]:
    """Cut some units out of every group of a copy and find which groups that breaks, and how.

    All groups are tried at once; only if that fails are they separated by halving.

    Args:
        model: The model, without wrappers; it is copied.
        groups: Its groups.
        example_inputs: What the model is called with.
        forward_fn: How to call it otherwise.
        operations: What runs on the example inputs, if it is known; allows smaller images.

    Returns:
        A sentence for each group that cannot be cut.

    Raises:
        ParameterError: If the model cannot be copied.

    Cost: a copy of the model and two forward passes; a few more for every kind of group that fails.
    """
    reasons: dict[str, str] = {}
    changed: dict[str, str] = {}
    suspects = list(groups)
    if not suspects:
        return {}
    for dtype in dtypes_for(model):
        twins = partial(Twin, model, example_inputs, forward_fn, dtype, 1)
        joint = twins(operations=operations)
        if not changed and _failure(joint, suspects, put_back=False) is None:
            return reasons
        result = _failing(twins(), suspects)
        # Rounding does not keep a model from running.
        reasons |= {name: why for name, why in result.items() if not why.startswith(_CHANGED)}
        changed = {name: why for name, why in result.items() if why.startswith(_CHANGED)}
        suspects = [group for group in suspects if group.name in changed]
        if not suspects:
            return reasons
    return reasons | changed


def _failing(twin: Twin, groups: Sequence[UnitGroup]) -> dict[str, str]:
    """Remove the groups at the place where a cut fails, until none fails."""
    reasons: dict[str, str] = {}
    rest = list(groups)
    while rest and (failure := _failure(twin, rest)) is not None:
        near = _near(twin.place(_part(twin, rest)), rest)
        result = _halved(twin, near) or {group.name: failure for group in near}
        for kind in {_make(group) for group in near if group.name in result}:
            alike = [g for g in rest if g.name not in result and _make(g) == kind]
            result |= _alike(twin, alike)
        reasons |= result
        rest = [group for group in rest if group.name not in result]
    return reasons


def _make(group: UnitGroup) -> tuple[object, ...]:
    """What groups of the same code have in common: names without numbers."""
    return tuple((re.sub(r"\d+", "0", piece.name), piece.dim) for piece in group.slices)


def _alike(twin: Twin, groups: Sequence[UnitGroup]) -> dict[str, str]:
    """Find which groups fail that are built like a failing one: usually all or none.

    If they fail jointly and so do the first, the middle and the last on their own, all count as
    failing; if not, they are separated.
    """
    if not groups or _failure(twin, groups) is None:
        return {}
    failure = ""
    for place in dict.fromkeys((len(groups) - 1, len(groups) // 2, 0)):
        result = _failure(twin, [groups[place]])
        if result is None:
            return _halved(twin, groups)
        failure = result
    return {group.name: failure for group in groups}


def _near(place: str, groups: Sequence[UnitGroup]) -> Sequence[UnitGroup]:
    """Groups with a tensor in a module, or else in the nearest one around it that has some."""
    while place:
        inside = [
            group
            for group in groups
            if any(piece.name.startswith(f"{place}.") for piece in group.slices)
        ]
        if inside:
            return inside
        place = place.rpartition(".")[0]
    return groups


def _halved(twin: Twin, groups: Sequence[UnitGroup]) -> dict[str, str]:
    failure = _failure(twin, groups)
    if failure is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: failure}
    middle = len(groups) // 2
    return _halved(twin, groups[:middle]) | _halved(twin, groups[middle:])


def _failure(twin: Twin, groups: Sequence[UnitGroup], *, put_back: bool = True) -> str | None:
    """Why a cut through groups fails, ``None`` if it does not or nothing can be compared."""
    try:
        result, _ = twin.difference(_part(twin, groups), put_back=put_back)
    except Exception as error:
        return first_line(error)
    if result > TOLERANCES[twin.dtype]:
        return f"{_CHANGED} by {result:.2g} of the largest output"
    return None


def _part(twin: Twin, groups: Sequence[UnitGroup]) -> ShrinkPlan:
    """A cut through each of the groups."""
    return plan_of(twin.model, groups, {group.name: _some(group) for group in groups})


def _some(group: UnitGroup) -> Tensor:
    """Two thirds of the units, at least one and not all."""
    units = torch.arange(group.units)
    return units[units % 3 != 1] if group.units > 1 else units
