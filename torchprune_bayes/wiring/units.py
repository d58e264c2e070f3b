"""Groups of units from the wiring of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.wiring._labels import compressed, varying
from torchprune_bayes.wiring.groups import AttributeRule, Kind, Role, UnitGroup, UnitSlice
from torchprune_bayes.wiring.trace import Side, Wiring

COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "nhead",
    "heads",
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "num_q_heads",
    "num_query_heads",
)
"""Attributes in which modules keep how many heads they have."""

HEADS_WIDTHS = (
    "all_head_size",
    "split_size",
    "attn_dim",
    "inner_dim",
    "attention_dim",
    "key_attn_dim",
    "val_attn_dim",
    "q_size",
    "kv_size",
)
"""Attributes in which modules keep how wide all their heads are together."""

SHARING = ("num_key_value_groups", "n_rep")
"""Attributes that say how many heads share a key: all of them, where there is only one."""

WIDTHS = (
    *HEADS_WIDTHS,
    "dim",
    "embed_dim",
    "d_model",
    "hidden_size",
    "hidden_dim",
)
"""The same, and names under which others keep the width of the model."""

SCALES = ("scale", "scaling", "softmax_scale", "scale_factor", "norm_factor", "inv_norm_factor")
"""Attributes in which modules keep what products of queries and keys are multiplied by."""

_MODEL_NUMBERS = ("num_features", "head_hidden_size", "last_channel")


def groups_of(model: nn.Module, wiring: Wiring) -> list[UnitGroup]:
    """List the units of a traced run, with units of equal structure in one group.

    Args:
        model: The model that was observed.
        wiring: The result of tracing it.

    Returns:
        Groups of at least two units that a layer produces, in the order of these layers.
    """
    places = _places(wiring)
    modules = dict(model.named_modules())
    last = next((name for name in reversed(modules) if isinstance(modules[name], nn.Linear)), None)
    groups = []
    for sides, classes, positions in places:
        slices = tuple(
            UnitSlice(side.name, side.dim, at, _role(modules, wiring, side))
            for side, at in zip(sides, positions, strict=True)
        )
        makers = [piece for piece in slices if piece.role == "producer"]
        if len(classes) < 2 or not makers:
            continue
        name = makers[0].name.rpartition(".")[0]
        heads = bool(wiring.heads[classes].any())
        kind = "head" if heads else _kind(modules[name])
        group = UnitGroup(name, kind, len(classes), slices)
        rules = [*_rules(model, wiring, group, classes), *_model_numbers(model, last, group)]
        groups.append(replace(group, attributes=tuple(dict.fromkeys(rules))))
    order = {name: place for place, name in enumerate(modules)}
    groups.sort(key=lambda group: (order[group.name], int(group.slices[0].positions.min())))
    return _distinct(groups)


def _places(wiring: Wiring) -> Iterator[tuple[list[Side], Tensor, list[Tensor]]]:
    """Yield the sides, the classes and the positions ``[units, entries]`` of each group."""
    size = torch.tensor([side.size for side in wiring.sides])
    number = torch.repeat_interleave(torch.arange(len(size)), size)
    start = torch.tensor([side.start for side in wiring.sides])
    atoms = torch.arange(1, 1 + len(number))
    classes = wiring.classes[1:]
    free = classes > 0
    number, atoms, classes = number[free], atoms[free], classes[free]
    keys, counts = torch.unique(classes * len(size) + number, return_counts=True)
    owner, side = keys // len(size), keys % len(size)
    hashes = _hashed(side, counts)
    makes, inverse = torch.unique(owner, return_inverse=True)
    signature = torch.zeros(len(makes), dtype=torch.int64).index_add_(0, inverse, hashes)
    make_of = torch.zeros(len(wiring.classes), dtype=torch.int64)
    make_of[makes] = torch.unique(signature, return_inverse=True)[1]
    # Entries by make, side and class: what all units of a make have of a side is one stretch.
    stretch = make_of[classes] * len(size) + number
    order = (stretch * len(wiring.classes) + classes).argsort(stable=True)
    classes, atoms = classes[order], atoms[order]
    stretches, lengths = torch.unique_consecutive(stretch[order], return_counts=True)
    parts = zip(
        stretches.tolist(),
        classes.split(lengths.tolist()),
        atoms.split(lengths.tolist()),
        strict=True,
    )
    for _, own in groupby(parts, key=lambda part: part[0] // len(size)):
        pieces = list(own)
        units = pieces[0][1].unique()
        if len(units) > 1:
            at = [index % len(size) for index, _, _ in pieces]
            places = [each - start[k] for k, (_, _, each) in zip(at, pieces, strict=True)]
            positions = [each.reshape(len(units), -1) for each in places]
            yield [wiring.sides[k] for k in at], units, positions


def _hashed(side: Tensor, counts: Tensor) -> Tensor:
    """Numbers that, summed over the sides of a class, identify sides and counts."""
    mixed = (side + 1) * 0x9E3779B97F4A7C + counts * 0x5851F42D4C957F
    for shift, factor in ((31, 0x7FB5D329728EA1), (27, 0x81DADEF4BC2DD4)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed ^ (mixed >> 33)


def _distinct(groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """Number the groups of a layer that produces units of several kinds, from the second on."""
    seen: dict[str, int] = {}
    result = []
    for group in groups:
        seen[group.name] = count = seen.get(group.name, 0) + 1
        result.append(group if count == 1 else replace(group, name=f"{group.name}:{count}"))
    return result


def _kind(module: nn.Module) -> Kind:
    return "channel" if isinstance(module, (_ConvNd, _NormBase)) else "hidden"


def _role(modules: dict[str, nn.Module], wiring: Wiring, side: Side) -> Role:
    """Role of a tensor for the units along a dimension."""
    path, _, key = side.name.rpartition(".")
    module = modules[path]
    if isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels:
        return "norm"
    kind = kind_of(module)
    if kind.prunable and key.endswith("bias"):
        return "producer"
    if kind.is_matrix(module) or "weight" in kind.prunable:
        return "producer" if key == "bias" or side.dim == kind.output_dim else "consumer"
    if kind.is_table:
        return "producer"
    if isinstance(module, nn.RNNBase):
        return "consumer" if side.dim else "producer"
    roles: tuple[Role, ...] = ("norm", "producer", "consumer")
    return roles[int(wiring.roles[side.start])]


def _rules(
    model: nn.Module, wiring: Wiring, group: UnitGroup, classes: Tensor
) -> list[AttributeRule]:
    """Return the numbers on modules that depend on the units of a group."""
    rules = [
        AttributeRule(name, key, int((labels == classes[0]).sum()))
        for name, key, labels in wiring.numbers
        if bool((labels == classes[0]).any())
    ]
    counts: dict[str, list[int]] = {}
    for reshape in wiring.reshapes:
        labels = compressed(reshape.labels)
        if len(varying(labels)) == 1 and bool((labels == classes[0]).any()):
            counts.setdefault(reshape.module, []).append(labels.numel())
    for name, numbers in counts.items():
        rules += _head_rules(model, name, group, numbers)
    for name, labels, start, stop in wiring.widths:
        whole = (labels, labels[start:stop])
        sizes = {len(part) for part in whole if bool(torch.isin(part, classes).all())}
        rules += _width_rules(model, name, group, sizes)
    return rules


def _head_rules(
    model: nn.Module, name: str, group: UnitGroup, counts: Sequence[int]
) -> Iterator[AttributeRule]:
    """Yield the attributes for number and width of heads of a module that views them.

    Modules inside it, such as one with a bias for every head, have the number too.
    """
    sizes = {piece.positions.numel() for piece in group.slices}
    for inner, module in model.get_submodule(name).named_modules(prefix=name):
        if kind_of(module).counts_units:
            continue
        for key, value in vars(module).items():
            if type(value) is not int or not value or value % group.units:
                continue
            width = inner == name and key in WIDTHS and value in sizes
            shared = key in SHARING and value == max(counts)
            if width or shared or (key in COUNTS and value in counts):
                yield AttributeRule(inner, key, value // group.units)


def _width_rules(
    model: nn.Module, name: str, group: UnitGroup, sizes: set[int]
) -> Iterator[AttributeRule]:
    """Yield the numbers by which a module may split a dimension into parts."""
    module = model.get_submodule(name)
    for key, value in () if kind_of(module).counts_units else vars(module).items():
        if type(value) is int and value in sizes and value % group.units == 0:
            yield AttributeRule(name, key, value // group.units)


def _model_numbers(model: nn.Module, last: str | None, group: UnitGroup) -> Iterator[AttributeRule]:
    """Yield the sizes that timm and torchvision store on the model for replacing its last layer."""
    for piece in group.slices:
        owner = piece.name.rpartition(".")[0]
        if piece.role == "consumer" and owner == last:
            size = model.get_parameter(piece.name).shape[piece.dim]
            if piece.positions.numel() == size:
                for name in _MODEL_NUMBERS:
                    if vars(model).get(name) == size:
                        yield AttributeRule("", name, piece.positions.shape[1])
