"""Layers whose outputs are kept whole, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.wiring.groups import UnitGroup
from torchprune_bayes.wiring.trace import OUTPUTS, Side, Wiring
from torchprune_bayes.wiring.unseen import unreached


def kept_whole(model: nn.Module, wiring: Wiring, groups: Sequence[UnitGroup]) -> dict[str, str]:
    """Explain for all layers that produce no units of a group why they do not.

    Layers whose outputs are combined, as in additions, share one line; the model's outputs have
    none.

    Args:
        model: The model that was observed.
        wiring: The result of tracing it.
        groups: Its groups.

    Returns:
        A sentence for the first layer of each kind, by its name, in the order of the modules.
    """
    made = {(piece.name, piece.dim) for group in groups for piece in group.slices}
    reasons = dict(wiring.parametrized)
    explained: set[int] = set()
    for name, side in _makers(model, wiring):
        if name in reasons or (side.name, side.dim) in made:
            continue
        part = int(wiring.parts[side.start])
        why = _reason(wiring, part) or _cut_up(wiring, side)
        if part not in explained and why != OUTPUTS:
            reasons[name] = why
        explained.add(part)
    for name in unreached(model, wiring.used):
        reasons[name] = "the example inputs do not reach it"
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(reasons.items(), key=lambda item: order[item[0]]))


def _makers(model: nn.Module, wiring: Wiring) -> Iterator[tuple[str, Side]]:
    """Yield the sides along which layers produce their outputs, with the layers' names."""
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
    """The first reason that fixes atoms joined with a part."""
    reasons = (why for labels, why in wiring.reasons if _meets(wiring.parts[labels], part))
    return next(reasons, None)


def _cut_up(wiring: Wiring, side: Side) -> str:
    """Why units can only be removed all at once."""
    one = int(wiring.classes[side.start])
    module = next((name for name, labels, *_ in wiring.widths if _meets(labels, one)), None)
    return "all of them go together" + (
        "" if module is None else f", since `{module or 'the model'}` cuts them into uneven parts"
    )


def _meets(parts: Tensor, part: int) -> bool:
    return bool((parts == part).any())
