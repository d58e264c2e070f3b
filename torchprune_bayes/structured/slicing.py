"""Removing units from a model: from kept units to kept indices of tensors to smaller tensors.

In plain words: a plan says which indices along which dimension of which tensor are kept. Applying
it puts smaller parameters and buffers in place of the old ones, which are not touched, and sets the
size attributes of layers. So a cut can be undone by putting the old ones back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured._replacement import Change, replacement
from torchprune_bayes.structured.groups import Kept, UnitGroup, check_kept
from torchprune_bayes.wiring.tensors import all_tensors


@dataclass(frozen=True)
class ShrinkPlan:
    """The indices of tensors that are kept.

    Attributes:
        kept: For each tensor that is cut, by its first qualified name, and each dimension along
            which it is cut: the kept indices, ascending.
        shapes: The shapes of these tensors before the cut.
        attributes: For each module, by qualified name, the numbers that the groups' rules set.
        factors: For each tensor that is rescaled, and each dimension, a factor for each index
            before the cut, see :class:`~torchprune_bayes.wiring.groups.HeadPart`.

    Example:
        >>> plan = ShrinkPlan({"w": {0: torch.tensor([0, 2])}}, {"w": (3,)}, {})
        >>> plan.cut("w", torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 3.])
        >>> plan.expand("w", torch.tensor([1.0, 3.0]))
        tensor([1., 0., 3.])
    """

    kept: Mapping[str, Mapping[int, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, float]]
    factors: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """Return the kept part of a tensor that is shaped like ``name`` before the cut.

        The same holds for a parameter, its gradient and its optimizer state, except for the factors
        of :meth:`rescaled` ones. A tensor that the plan does not mention comes back as it is;
        otherwise the result shares no memory.
        """
        for dim, indices in self.kept.get(name, {}).items():
            tensor = tensor.index_select(dim, indices.to(tensor.device))
        return tensor

    def rescaled(self, name: str, tensor: Tensor, power: int = 1) -> Tensor:
        """Return a tensor after the cut with the factors of its kept entries, if any.

        A parameter takes its factors as they are. A gradient takes their inverse, the power -1,
        since the loss depends on a rescaled parameter the less the larger it has become.
        """
        for dim, factors in self.factors.get(name, {}).items() if power else ():
            indices = self.kept[name][dim]
            shape = [1] * tensor.dim()
            shape[dim] = -1
            tensor = tensor * factors[indices].pow(power).reshape(shape).to(tensor)
        return tensor

    def gradient(self, name: str, tensor: Tensor) -> Tensor:
        """Return the kept part of a gradient, with respect to the rescaled parameter."""
        return self.rescaled(name, self.cut(name, tensor), -1)

    def expand(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the shape before the cut: ``tensor`` at kept entries, zero elsewhere.

        A right inverse of :meth:`cut`: cutting the result gives ``tensor`` again.
        """
        for dim, indices in self.kept.get(name, {}).items():
            shape = list(tensor.shape)
            shape[dim] = self.shapes[name][dim]
            tensor = tensor.new_zeros(shape).index_copy_(dim, indices.to(tensor.device), tensor)
        return tensor

    def masked(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy with zeros at the entries that the cut removes."""
        return self.mask_(name, tensor.clone())

    def mask_(self, name: str, tensor: Tensor) -> Tensor:
        """Zero what would be cut off, in place."""
        # A product is several times as fast, but leaves what is not finite.
        product = tensor.is_floating_point() and math.isfinite(float(tensor.detach().sum()))
        for dim, indices in self.kept.get(name, {}).items():
            stays = torch.zeros(tensor.shape[dim], dtype=torch.bool)
            stays[indices] = True
            if product:
                shape = [1] * tensor.dim()
                shape[dim] = -1
                tensor.mul_(stays.reshape(shape).to(tensor))
            else:
                tensor.index_fill_(dim, (~stays).nonzero()[:, 0].to(tensor.device), 0)
        return tensor


def plan_of(model: nn.Module, groups: Sequence[UnitGroup], kept: Kept) -> ShrinkPlan:
    """Compute which indices of which tensors are kept.

    Args:
        model: The model that the groups belong to; wrappers are looked through.
        groups: The groups, with the model's present numbering.
        kept: The units that stay, by the name of their group; a missing group is kept whole.

    Returns:
        The plan. Tensors that lose nothing are not in it.

    Raises:
        ArgumentError: If a group or unit does not exist, a group would lose all its units, or the
            groups do not fit the model.

    Example:
        >>> from torchprune_bayes.structured.groups import UnitSlice
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1))
        >>> units = torch.arange(3)[:, None]
        >>> slices = (
        ...     UnitSlice("0.weight", 0, units, "producer"),
        ...     UnitSlice("1.weight", 1, units, "consumer"),
        ... )
        >>> group = UnitGroup("0", "hidden", 3, slices)
        >>> plan = plan_of(model, [group], {"0": torch.tensor([2, 0])})
        >>> plan.kept
        {'0.weight': {0: tensor([0, 2])}, '1.weight': {1: tensor([0, 2])}}
    """
    check_kept(groups, kept)
    first, tensors = first_names(unwrap(model))
    stays: dict[str, dict[int, Tensor]] = {}
    attributes: dict[str, dict[str, float]] = {}
    for group in groups:
        units = kept.get(group.name)
        if units is None or len(units) == group.units:
            continue
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[units.cpu()] = False
        for piece in group.slices:
            name = first.get(piece.name)
            if name is None or piece.dim >= tensors[name].dim():
                raise ArgumentError(
                    f"Expected a tensor `{piece.name}` with dimension {piece.dim}, got none."
                )
            size = tensors[name].shape[piece.dim]
            mask = stays.setdefault(name, {}).setdefault(
                piece.dim, torch.ones(size, dtype=torch.bool)
            )
            _mark(mask, piece.positions[gone.to(piece.positions.device)].reshape(-1).cpu(), name)
        for rule in group.attributes:
            attributes.setdefault(rule.module, {})[rule.attribute] = rule.value(len(units))
    indices = {
        name: {dim: mask.nonzero()[:, 0] for dim, mask in sorted(masks.items())}
        for name, masks in stays.items()
    }
    shapes = {name: tuple(tensors[name].shape) for name in stays}
    return ShrinkPlan(indices, shapes, attributes, _factors(groups, kept, first, shapes))


def apply_plan(
    model: nn.Module, plan: ShrinkPlan, *, values: Mapping[str, Tensor] | None = None
) -> Change:
    """Cut a model in place.

    Parameters that are cut are replaced by new ones with the same ``requires_grad``, type, device,
    memory format and attributes, and with the kept part of their gradient; buffers likewise. All
    others stay the same objects. Tied tensors stay tied, and layers get their new sizes.

    Args:
        model: The model; wrappers are looked through.
        plan: The plan, made for the model as it is.
        values: New values of tensors, by first qualified name and with the shapes before the cut,
            such as weights that compensate for the removal. The old tensors are not written to.

    Returns:
        What was replaced, with ``undo`` and ``redo``.

    Raises:
        ArgumentError: If the plan or the values do not fit the model.
        ParameterError: If a layer cannot be cut. In both cases nothing has changed.

    Cost: the cut tensors exist twice as long as the returned change is held.
    """
    inner = unwrap(model)
    _, tensors = first_names(inner)
    _check_shapes(plan, tensors)
    given = dict(values or {})
    for name, value in given.items():
        if name not in tensors or value.shape != tensors[name].shape:
            raise ArgumentError(
                f"Expected values for `{name}` of shape "
                f"{tuple(tensors[name].shape) if name in tensors else 'none'}, got "
                f"{tuple(value.shape)}."
            )
    fresh: dict[str, Tensor] = {}
    for name in dict.fromkeys([*plan.kept, *given]):
        old = tensors[name].detach()
        source = given[name].detach().to(old, copy=True) if name in given else old
        fresh[name] = plan.rescaled(name, plan.cut(name, source))
    return replacement(inner, fresh, plan.gradient, plan.attributes)


def groups_after(groups: Sequence[UnitGroup], plan: ShrinkPlan, kept: Kept) -> list[UnitGroup]:
    """Return the groups with the numbering of the model after a cut.

    Args:
        groups: The groups before it.
        plan: The plan made of these groups and ``kept``.
        kept: The units that stay.

    Returns:
        The same groups, with the units that stay in their old order.
    """
    result = []
    for group in groups:
        units = kept.get(group.name)
        units = torch.arange(group.units) if units is None else units.cpu().sort().values
        slices = tuple(
            replace(
                piece, positions=_renumbered(plan, piece.name, piece.dim, piece.positions, units)
            )
            for piece in group.slices
        )
        result.append(replace(group, units=len(units), slices=slices))
    return result


def zero_units(model: nn.Module, plan: ShrinkPlan) -> None:
    """Zero everything that a plan removes, in place: parameters, norms and their statistics.

    The model keeps its shapes and then computes what the cut model computes.

    Args:
        model: The model; wrappers are looked through.
        plan: The plan, made for the model as it is.

    Raises:
        ArgumentError: If the plan does not fit the model; nothing has changed then.
    """
    _, tensors = first_names(unwrap(model))
    _check_shapes(plan, tensors)
    with torch.no_grad():
        for name in plan.kept:
            plan.mask_(name, tensors[name])


def first_names(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return each tensor's first name by any of its names, and the tensors by first name.

    Example:
        >>> model = nn.ModuleList([nn.Linear(2, 2, bias=False)] * 2)
        >>> first_names(model)[0]
        {'0.weight': '0.weight', '1.weight': '0.weight'}
    """
    names: dict[int, str] = {}
    first: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor, _ in all_tensors(model):
        first[name] = names.setdefault(id(tensor), name)
        tensors.setdefault(first[name], tensor)
    return first, tensors


def _mark(mask: Tensor, positions: Tensor, name: str) -> None:
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < len(mask):
        raise ArgumentError(
            f"Expected positions in [0, {len(mask)}) for `{name}`, got some up to "
            f"{int(positions.max())}: the groups were made for another model."
        )
    mask[positions] = False


def _factors(
    groups: Sequence[UnitGroup],
    kept: Kept,
    first: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, dict[int, Tensor]]:
    """Factors of queries and keys whose products are to keep their scale."""
    factors: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        left = len(kept.get(group.name, ())) or group.units
        rescaled = [at for part in group.parts if part.rescaled for at in part.slices]
        for piece in (group.slices[at] for at in rescaled if left < group.units):
            name = first[piece.name]
            whole = torch.ones(shapes[name][piece.dim], dtype=torch.float64)
            along = factors.setdefault(name, {}).setdefault(piece.dim, whole)
            along[piece.positions.reshape(-1).cpu()] = (left / group.units) ** 0.25
    return factors


def _check_shapes(plan: ShrinkPlan, tensors: Mapping[str, Tensor]) -> None:
    for name, shape in plan.shapes.items():
        result = tuple(tensors[name].shape) if name in tensors else None
        if result != tuple(shape):
            raise ArgumentError(
                f"Expected `{name}` of shape {tuple(shape)} as in the plan, got {result}."
            )


def _renumbered(plan: ShrinkPlan, name: str, dim: int, positions: Tensor, units: Tensor) -> Tensor:
    rows = positions[units.to(positions.device)]
    indices = plan.kept.get(name, {}).get(dim)
    return rows if indices is None else torch.searchsorted(indices.to(rows.device), rows)
