"""Layers whose outputs stay whole, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.wiring.groups import UnitGroup
from torchprune_bayes.wiring.trace import OUTPUTS, Side, Wiring
from torchprune_bayes.wiring.unseen import unreached


def kept_whole(model: nn.Module, wiring: Wiring, groups: Sequence[UnitGroup]) -> dict[str, str]:
    """Say for all layers that make no units of a group why they do not.

    Layers whose outputs meet, as in additions, have one line, and the outputs of the model none.

    Args:
        model: The model that was observed.
        wiring: What was seen.
        groups: Its groups.

    Returns:
        A sentence for the first layer of each kind, by its name, in the order of the modules.
    """
    made = {(piece.name, piece.dim) for group in groups for piece in group.slices}
    found = dict(wiring.parametrized)
    known: set[int] = set()
    for name, side in _makers(model, wiring):
        if name in found or (side.name, side.dim) in made:
            continue
        part = int(wiring.parts[side.start])
        why = _reason(wiring, part) or _cut_up(wiring, side)
        if part not in known and why != OUTPUTS:
            found[name] = why
        known.add(part)
    for name in unreached(model, wiring.used):
        found[name] = "the example inputs do not reach it"
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _makers(model: nn.Module, wiring: Wiring) -> Iterator[tuple[str, Side]]:
    """Yield the sides along which layers make their outputs, with the layers' names."""
    modules = dict(model.named_modules())
    for side in wiring.sides:
        path, _, key = side.name.rpartition(".")
        kind = kind_of(modules[path])
        dim = 1 if kind.is_table else kind.output_dim
        weight = modules[path]._parameters.get(key)
        matrix = key == "weight" and weight is not None and weight.dim() > 1
        if side.name in wiring.used and side.dim == dim and matrix:
            yield path, side


def _reason(wiring: Wiring, part: int) -> str | None:
    """The first reason for which something stays that goes with a part."""
    found = (why for labels, why in wiring.reasons if _meets(wiring.parts[labels], part))
    return next(found, None)


def _cut_up(wiring: Wiring, side: Side) -> str:
    """What lets units stay or go only all together."""
    one = int(wiring.classes[side.start])
    module = next((name for name, labels, *_ in wiring.widths if _meets(labels, one)), None)
    return "all of them go together" + (
        "" if module is None else f", since `{module or 'the model'}` cuts them into uneven parts"
    )


def _meets(parts: Tensor, part: int) -> bool:
    return bool((parts == part).any())
