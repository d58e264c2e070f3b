"""Dimensions inside of heads as units: queries with keys, and values with their readers.

In plain words: attention views its projections as heads of one size, so all heads of a layer lose
the same number of dimensions, but each may lose its least important ones. A unit is therefore
one dimension of every head. These are chosen by scores before anything is removed:
the best dimension of each head makes the first unit, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.structured._verification import failing_groups
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.wiring.forward import ForwardFunction
from torchprune_bayes.wiring.groups import AttributeRule, HeadPart, UnitSlice
from torchprune_bayes.wiring.trace import Wiring, observe
from torchprune_bayes.wiring.units import HEADS_WIDTHS, SCALES, WIDTHS, groups_of

if TYPE_CHECKING:
    from torchprune_bayes.structured.importance import UnitImportance

SIZES = (
    "head_dim",
    "attention_head_size",
    "dim_head",
    "d_head",
    "head_size",
    "dim_per_head",
    "size_per_head",
    "d_kv",
    "d_k",
    "key_value_proj_dim",
)
"""Attributes in which modules keep how many dimensions a head has."""

_NAMES = (SIZES + HEADS_WIDTHS, SIZES + WIDTHS, SIZES, ())
"""Attributes that are taken to follow, in the order in which they are tried."""


def dimensions_of(
    model: nn.Module,
    heads: Sequence[UnitGroup],
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
) -> tuple[list[UnitGroup], dict[str, str]]:
    """Find the dimensions inside of heads that can be removed.

    Queries and keys on the one hand and values on the other are removed separately where the module
    lets them have different sizes, and otherwise the same number of both, chosen independently.
    Each candidate is tried on a copy of the model.

    The scale ``1/√d`` of attention is that of the whole model. Modules that compute it from the
    number of dimensions get the remaining queries and keys multiplied by ``(d'/d)^¼`` each. Where
    neither this nor no scaling gives the outputs of the whole model with zeros for
    removed dimensions, they are kept whole.

    Args:
        model: The model, without wrappers.
        heads: Its groups of heads.
        example_inputs: What it is called with.
        forward_fn: How to call it otherwise.

    Returns:
        The groups that replace those of heads; and what is kept whole, with the reason,
        by the name of the layer.

    Cost: three to about twenty forward passes, and a few copies of the model.
    """
    wiring = observe(model, example_inputs, forward_fn, whole_heads=False)
    fine = groups_of(model, wiring)
    left_out: dict[str, str] = {}
    attentions: dict[str, list[UnitGroup]] = {}
    for group in heads:
        parts = list(_parts(group, fine))
        for part in parts:
            attentions.setdefault(_layer(part).rpartition(".")[0], []).append(part)
        if all(_is_read(part) for part in parts):
            left_out |= [_stays(group, wiring)]
    removable: dict[str, UnitGroup] = {}
    why: dict[str, str] = {}
    for turn in range(max(map(len, attentions.values()), default=0)):
        # Parts of one module could hide each other's failures.
        alone = [result[turn] for result in attentions.values() if turn < len(result)]
        works, fails = _tried(model, alone, (_NAMES[0], ()), example_inputs, forward_fn)
        removable |= works
        why |= fails
    rest = [
        [part for part in result if part.name not in removable] for result in attentions.values()
    ]
    joint = [joined for result in rest if (joined := _joined(result))]
    works, fails = _tried(model, joint, _NAMES, example_inputs, forward_fn)
    removable |= works
    for result in rest:
        if result and _layer(result[0]) not in works:
            reason = fails.get(_layer(result[0])) or why[result[0].name]
            left_out[_layer(result[0])] = f"its heads cannot have another size: {reason}"
    return list(removable.values()), left_out


def arranged(
    model: nn.Module, groups: Sequence[UnitGroup], importance: UnitImportance
) -> list[UnitGroup]:
    """Put the dimensions of each head in the order of their scores, the best one in unit 0.

    Args:
        model: The model.
        groups: Its groups; those without dimensions of heads come back as they are.
        importance: Scores each dimension of each head on its own.

    Returns:
        The groups, with a unit's entries in each head reordered.

    Cost: one preparation of the importance, if there is such a group.
    """
    single = {
        (group.name, at): _single(group, part, at)
        for group in groups
        for at, part in enumerate(group.parts)
        if part.heads > 1
    }
    if not single:
        return list(groups)
    importance.prepare(model, list(single.values()))
    scores = {key: importance.score(each, model) for key, each in single.items()}
    return [_reordered(group, scores) for group in groups]


def _parts(group: UnitGroup, fine: Sequence[UnitGroup]) -> Iterator[UnitGroup]:
    """Yield the dimensions inside of the heads of a group: queries with keys, and values."""
    owner = {(piece.name, piece.dim): _owners(piece) for piece in group.slices}
    made = {piece.name for piece in group.slices if piece.role == "producer"}
    for place, result in enumerate(fine):
        inside = [piece for piece in result.slices if (piece.name, piece.dim) in owner]
        if not inside or not made & {piece.name for piece in inside}:
            continue
        laid = [_by_head(piece, owner.get((piece.name, piece.dim))) for piece in result.slices]
        heads = group.units if all(each is not None for each in laid) else 1
        slices = tuple(
            each if each is not None and heads > 1 else piece
            for each, piece in zip(laid, result.slices, strict=True)
        )
        part = HeadPart(tuple(range(len(slices))), heads)
        yield UnitGroup(f"{result.name}:{place}", "dimension", result.units, slices, parts=(part,))


def _owners(piece: UnitSlice) -> dict[int, int]:
    """The head that each position belongs to."""
    rows = piece.positions.tolist()
    return {position: head for head, row in enumerate(rows) for position in row}


def _by_head(piece: UnitSlice, owners: Mapping[int, int] | None) -> UnitSlice | None:
    """The same positions, one head after the other; ``None`` if heads share some."""
    if owners is None:
        return None
    rows = []
    for row in piece.positions.tolist():
        if any(position not in owners for position in row):
            return None
        rows.append(sorted(row, key=lambda position: (owners[position], position)))
    heads = torch.tensor([[owners[position] for position in row] for row in rows])
    count = len(set(owners.values()))
    even = torch.arange(count).repeat_interleave(heads.shape[1] // count)
    if heads.shape[1] % count or not bool((heads == even).all()):
        return None
    return replace(piece, positions=torch.tensor(rows))


def _is_read(group: UnitGroup) -> bool:
    return any(piece.role == "consumer" for piece in group.slices)


def _layer(group: UnitGroup) -> str:
    """The first layer that produces the units."""
    maker = next(piece for piece in group.slices if piece.role == "producer")
    return maker.name.rpartition(".")[0]


def _stays(group: UnitGroup, wiring: Wiring) -> tuple[str, str]:
    """The first layer that produces the heads, and why their queries and keys are kept."""
    layer = _layer(group)
    sides = [side for side in wiring.sides if side.name.rpartition(".")[0] == layer]
    given = (
        reason
        for side in sides
        for labels, reason in wiring.reasons
        if bool(((labels >= side.start) & (labels < side.start + side.size)).any())
    )
    reason = next(given, "no product of queries and keys was seen")
    return layer, f"dimensions of its heads go together: {reason}"


def _joined(parts: Sequence[UnitGroup]) -> UnitGroup | None:
    """One group of a module's queries, keys and values, if they have equally many dimensions."""
    if len(parts) < 2 or len({part.units for part in parts}) > 1:
        return None
    slices: list[UnitSlice] = []
    chosen = []
    for part in parts:
        places = range(len(slices), len(slices) + len(part.slices))
        chosen.append(HeadPart(tuple(places), part.parts[0].heads))
        slices += part.slices
    name, units = _layer(parts[0]), parts[0].units
    return UnitGroup(name, "dimension", units, tuple(slices), parts=tuple(chosen))


def _tried(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    names: Sequence[Sequence[str]],
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
) -> tuple[dict[str, UnitGroup], dict[str, str]]:
    """Groups in the first form that works on a copy, and why the others do not."""
    removable: dict[str, UnitGroup] = {}
    reasons: dict[str, str] = {}
    seen: set[tuple[object, ...]] = set()
    for rescaled in (True, False):
        for sizes in names:
            forms = [
                form
                for group in groups
                if group.name not in removable
                for form in [_form(model, group, sizes, rescaled=rescaled)]
                if (form.name, form.attributes, form.parts) not in seen
            ]
            seen |= {(form.name, form.attributes, form.parts) for form in forms}
            result = failing_groups(model, forms, example_inputs, forward_fn)
            removable |= {form.name: form for form in forms if form.name not in result}
            reasons = result | reasons  # the first form is the one that was meant
    return removable, reasons


def _form(model: nn.Module, group: UnitGroup, sizes: Sequence[str], *, rescaled: bool) -> UnitGroup:
    """A group with its dependent numbers on modules, and with rescaled queries and keys."""
    unread = {id(piece) for piece in group.unread}
    rescaled = rescaled and bool(unread)
    parts = tuple(
        replace(part, rescaled=rescaled and id(group.slices[part.slices[0]]) in unread)
        for part in group.parts
    )
    rules = dict.fromkeys(_rules(model, group, sizes, scales=rescaled))
    return replace(group, attributes=tuple(rules), parts=parts)


def _rules(
    model: nn.Module, group: UnitGroup, names: Sequence[str], *, scales: bool
) -> Iterator[AttributeRule]:
    """Yield the numbers that modules with the projections keep about the dimensions of heads."""
    units = group.units
    widths = {units * part.heads for part in group.parts}
    widths |= {piece.positions.numel() for piece in group.slices if piece.role == "consumer"}
    for piece in group.slices:
        path = piece.name.rpartition(".")[0].rpartition(".")[0]
        module = model.get_submodule(path)
        for key, value in () if kind_of(module).counts_units else vars(module).items():
            if type(value) is int and key in names and value in (units, *widths):
                if (key in SIZES) == (value == units):
                    yield AttributeRule(path, key, value // units)
            elif scales and key in SCALES and value in (units**-0.5, units**0.5):
                yield AttributeRule(path, key, power=-0.5 if value == units**-0.5 else 0.5)


def _single(group: UnitGroup, part: HeadPart, at: int) -> UnitGroup:
    """Every dimension of every head as a unit of its own, to be scored."""
    units = group.units * part.heads
    slices = tuple(
        replace(group.slices[place], positions=group.slices[place].positions.reshape(units, -1))
        for place in part.slices
    )
    whole = (HeadPart(tuple(range(len(slices))), 1),)
    return UnitGroup(f"{group.name}:{at}", "dimension", units, slices, parts=whole)


def _reordered(group: UnitGroup, scores: Mapping[tuple[str, int], Tensor | None]) -> UnitGroup:
    slices = list(group.slices)
    for at, part in enumerate(group.parts):
        result = scores.get((group.name, at))
        if result is None:
            continue
        by_head = result.detach().cpu().double().reshape(group.units, part.heads)
        order = by_head.argsort(dim=0, descending=True, stable=True)
        for place in part.slices:
            rows = slices[place].positions.reshape(group.units, part.heads, -1)
            taken = rows.gather(0, order.to(rows.device)[:, :, None].expand_as(rows))
            slices[place] = replace(slices[place], positions=taken.flatten(1))
    return replace(group, slices=tuple(slices))
