"""Repair after torch-pruning's own pruners."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ParameterError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured._torch_pruning_groups import unit_group
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.repair import Repair, repair
from torchprune_bayes.structured.slicing import first_names, plan_of


@contextmanager
def repairing(
    pruner: Any, calibration: Calibration, *, damping: float | str = "auto"
) -> Iterator[list[Repair]]:
    """Compensate for what a pruner of torch-pruning removes in the body of a ``with`` statement.

    On leaving, the layers that read removed channels get the weights and biases of
    :func:`~torchprune_bayes.structured.repair`, and batch norms their statistics, fitted on the
    model as it was on entering. Nothing is done if the body raises or removes nothing.

    Args:
        pruner: A pruner with a dependency graph (``pruner.DG``) that records what it prunes, such
            as ``torch_pruning.pruner.BasePruner``.
        calibration: Data and model; the model is the pruner's.
        damping: See :func:`~torchprune_bayes.structured.repair`.

    Yields:
        A list that holds the repair after the body.

    Raises:
        AlignmentError: If the calibration is of another model.
        ParameterError: On leaving, if the removed units cannot be determined; the model is then as
            the pruner left it.

    Cost: that of the repair; the tensors before are held during the body.

    Example:
        >>> import torch_pruning as tp
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> data = [(x, torch.arange(64) % 2)]
        >>> calibration = Calibration(model, data, nn.functional.cross_entropy)
        >>> importance = tp.importance.GroupMagnitudeImportance()
        >>> pruner = tp.pruner.BasePruner(
        ...     model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[model[2]]
        ... )
        >>> with repairing(pruner, calibration) as repairs:
        ...     pruner.step()
        >>> model[0].out_features, [layer.name for layer in repairs[0].layers]
        (4, ['2'])
    """
    model = unwrap(pruner.DG.model)
    if model is not calibration.model:
        raise AlignmentError(
            "Expected the pruner's model in the calibration, got another one: build the "
            "calibration on that model."
        )
    result = (_converted(group, pruner.DG, model) for group in pruner.DG.get_all_groups())
    groups = [group for group in result if group is not None]
    before, recorded = _State(model), len(pruner.DG.pruning_history())
    repairs: list[Repair] = []
    yield repairs
    history = pruner.DG.pruning_history()[recorded:]
    if not history:
        return
    after = _State(model)
    before.restore()
    try:
        kept = _kept(model, groups, history)
        plan = plan_of(model, groups, kept)
        made = repair(calibration, groups, kept, damping=damping)
    finally:
        after.restore()
    _, tensors = first_names(model)
    values = {name: plan.cut(name, value) for name, value in made.values.items()}
    for name, value in values.items():
        if tensors[name].shape != value.shape:
            raise ParameterError(
                f"Expected `{name}` of shape {tuple(value.shape)} after the pruner's history, got "
                f"{tuple(tensors[name].shape)}: the model is left as the pruner left it."
            )
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    repairs.append(made)


class _State:
    """Tensors and plain attributes of all modules, the objects themselves."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (module, dict(vars(module)), dict(module._parameters), dict(module._buffers))
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Restore them."""
        for module, attributes, parameters, buffers in self._held:
            vars(module).clear()
            vars(module).update(attributes)
            tables: list[tuple[Any, Any]] = [
                (module._parameters, parameters),
                (module._buffers, buffers),
            ]
            for table, held in tables:
                table.clear()
                table.update(held)


def _converted(group: Any, graph: Any, model: nn.Module) -> UnitGroup | None:
    """A group of torch-pruning's, seen from a layer that reads it if its producers pack several.

    One dimension of a head is three rows of a packed projection and one column of what reads it.
    """
    result = unit_group(group, model)
    readers = [item for item in group if item.dep.handler.__name__ == "prune_in_channels"]
    for item in readers if result is None else ():
        layer = item.dep.target.module
        if isinstance(layer, nn.Module) and sorted(item.idxs) == [*range(len(item.idxs))]:
            result = unit_group(graph.get_pruning_group(layer, item.dep.handler, item.idxs), model)
            if result is not None:
                break
    return result


def _kept(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    history: Sequence[tuple[str, bool, Sequence[int]]],
) -> dict[str, Tensor]:
    """Units that stay, from prunings whose indices count what was left at the time."""
    _, tensors = first_names(model)
    left: dict[tuple[str, int], Tensor] = {}
    remaining = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    for name, makes, indices in history:
        weight = f"{name}.weight" if name else "weight"
        group, place, positions = _pruned_at(groups, weight, reads=not makes)
        present = left.get(place, torch.arange(tensors[place[0]].shape[place[1]]))
        gone = torch.isin(positions, present[torch.tensor(list(indices))])
        if bool((gone.any(1) != gone.all(1)).any()):
            raise ParameterError(
                f"Expected whole units of `{group.name}` to be pruned, got a part of one."
            )
        units = gone.all(1)
        remaining[group.name] &= ~units
        for piece in group.slices:
            place = (piece.name, piece.dim)
            if place[0] in tensors:
                size = tensors[place[0]].shape[place[1]]
                present = left.get(place, torch.arange(size))
                lost = piece.positions.cpu()[units].flatten()
                left[place] = present[~torch.isin(present, lost)]
    return {
        name: units.nonzero()[:, 0]
        for name, units in remaining.items()
        if not bool(units.all()) and bool(units.any())
    }


def _pruned_at(
    groups: Sequence[UnitGroup], weight: str, *, reads: bool
) -> tuple[UnitGroup, tuple[str, int], Tensor]:
    """The group whose units a layer makes or reads, and where its weight holds them."""
    for group in groups:
        for piece in group.slices:
            if piece.name == weight and (piece.role == "consumer") == reads:
                return group, (piece.name, piece.dim), piece.positions.cpu()
    raise ParameterError(
        f"Expected a group of units {'read' if reads else 'made'} by `{weight}`, got none: the "
        "model is left as the pruner left it."
    )
