"""From a group of torch-pruning's to positions of named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.structured.groups import AttributeRule, Kind, Role, UnitGroup, UnitSlice

Place: TypeAlias = tuple[str, int, Role]
"""Local name of a tensor, the dimension that is cut, and what the tensor is to the units."""

_BUFFERS = ("running_mean", "running_var")


def unit_group(group: Any, model: nn.Module) -> UnitGroup | None:
    """Convert a group of torch-pruning's.

    Args:
        group: A ``torch_pruning.dependency.Group``; its indices may be any subset, in any order.
        model: The model that was traced.

    Returns:
        The group; unit ``u`` is ``group[0].idxs[u]``. ``None`` if units own different numbers of
        entries, or a layer packs several matrices into one tensor.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    rank = {int(index): unit for unit, index in enumerate(group[0].idxs)}
    slices: list[UnitSlice] = []
    attributes: list[AttributeRule] = []
    for item in group:
        target = item.dep.target.module
        name = parameters.get(id(target), modules.get(id(target)))
        if name is None:  # an operation such as an addition or a concatenation
            continue
        positions = _positions(item.idxs, item.root_idxs, rank)
        if positions is None:
            return None
        if isinstance(target, nn.Parameter):
            slices.append(
                UnitSlice(name, item.dep.target.pruning_dim % target.dim(), positions, "norm")
            )
            continue
        places = _places(target, reads=item.dep.handler.__name__ == "prune_in_channels")
        if places is None:
            return None
        prefix = f"{name}." if name else ""
        slices += [UnitSlice(prefix + key, dim, positions, role) for key, dim, role in places]
        if "num_features" in vars(target) and not places:
            attributes.append(AttributeRule(name, "num_features", positions.shape[1]))
    maker = _first_maker(model, slices)
    if maker is None:
        return None
    layer = model.get_submodule(maker)
    made_by = kind_of(layer)
    kind: Kind = "hidden" if made_by.is_matrix(layer) and made_by.units_dim == -1 else "channel"
    return UnitGroup(maker, kind, len(rank), tuple(slices), tuple(attributes))


def _first_maker(model: nn.Module, slices: Sequence[UnitSlice]) -> str | None:
    """Name of the first layer, in the order of the model, that makes the units."""
    makers = {piece.name for piece in slices if piece.role == "producer"}
    names = [name for name, _ in model.named_parameters() if name in makers]
    return names[0].rpartition(".")[0] if names else None


def _positions(
    indices: Sequence[int], roots: Sequence[int | None], rank: Mapping[int, int]
) -> Tensor | None:
    """Entries of each unit, in the order in which torch-pruning lists them."""
    if any(root not in rank for root in roots):
        return None
    units = torch.tensor([rank[root] for root in roots if root is not None])
    counts = torch.bincount(units, minlength=len(rank))
    if int(counts.min()) == 0 or int(counts.min()) != int(counts.max()):
        return None
    order = units.argsort(stable=True)
    return torch.tensor(indices)[order].reshape(len(rank), -1)


def _places(module: nn.Module, *, reads: bool) -> list[Place] | None:
    """Which tensors of a layer belong to its outputs, or to its inputs if it ``reads`` them."""
    kind = kind_of(module)
    if kind.is_matrix(module):
        if reads:
            return [("weight", kind.input_dim, "consumer")]
        return list(_present(module, kind.output_dim, "producer"))
    per_unit = kind.is_per_unit(module)
    if per_unit is not None:
        return list(_present(module, 0, "norm")) if per_unit else []
    return [("weight", kind.output_dim, "producer")] if kind.is_table else None


def _present(module: nn.Module, dim: int, role: Role) -> Iterator[Place]:
    if getattr(module, "weight", None) is not None:
        yield "weight", dim, role
    if getattr(module, "bias", None) is not None:
        yield "bias", 0, role
    for name in _BUFFERS:
        if module._buffers.get(name) is not None:
            yield name, 0, role
