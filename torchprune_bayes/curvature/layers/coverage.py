"""Parameters for which the rules of layers are correct, checked on two samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from torchprune_bayes.calibration import Batch
from torchprune_bayes.curvature.layers.passes import Passes, Routes
from torchprune_bayes.layer_recording import Layer, layers_of
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Masks

# Rounding alone: float32 may mean TensorFloat32 in a GPU's convolutions, with 11 bits, and norms
# of float64 models may compute in float32.
_AGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-6}
_AUTOCAST_AGREEMENT = 5e-2  # its products have the 8 bits of bfloat16
# Gradients this much below the largest one are rounding errors of zero (biases of keys are so).
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
_MOST_INSERTED = 3


def unverified_routes(space: ParameterSpace, apart: Collection[str] = ()) -> Routes:
    """Rules for all layers that have one, and the rest, and ``apart``, sample by sample."""
    layers = _restricted(layers_of(space), set(space.names).difference(apart))
    known = _names_in(layers)
    return Routes(layers, singles=[name for name in space.names if name not in known])


def verified_routes(
    passes: Passes, two: Batch, *, couples: bool = False, apart: Collection[str] = ()
) -> Routes:
    """Routes that agree with autograd on two separate samples.

    Parameters without a correct rule are tried in one copy per sample, which suits those that the
    model broadcasts; the rest is differentiated sample by sample. Layers whose rule is correct
    for the batch of two still have Kronecker factors.

    Args:
        passes: The model.
        two: A batch of two samples.
        couples: Whether a batch's loss is not a mean of per-sample losses, so that no rule applies.
        apart: Parameters of layers that did not see whole samples in another batch, whose rule may
            agree on these two by chance.

    Cost: about ten passes over two samples, and two gradients.
    """
    space = passes.calibration.space
    layers = [] if couples else layers_of(space)
    exact = _exact_squares(passes, two, space.names)
    squares = _squares_by_rules(passes, two, layers)
    right = _agreeing(squares, exact, space.masks()).difference(apart)
    rest = [name for name in space.names if name not in right]
    shared = [] if couples else [name for name in rest if name not in apart]
    expanded = _expandable(passes, two, shared, exact)
    singles = [name for name in rest if name not in expanded]
    whole = _right_as_a_whole(passes, two, _restricted(layers, set(singles)))
    routes = Routes(_restricted(layers, right), whole, expanded, singles)
    return replace(routes, vectorized=_vmap_is_right(passes, two, singles, exact))


def coverage_of(routes: Routes, names: Iterable[str]) -> dict[str, str]:
    """Description of how the gradients of every parameter are computed."""
    kinds: dict[str, dict[str, None]] = {name: {} for name in names}
    for layer in routes.layers:
        for name in layer.names.values():
            kinds[name][type(layer.module).__name__] = None
    for layer in routes.whole:
        for name in layer.names.values():
            kinds[name][f"{type(layer.module).__name__} (factors of whole batches)"] = None
    for name in routes.expanded:
        kinds[name]["one copy per sample"] = None
    for name in routes.singles:
        kinds[name][f"one by one ({'vmap' if routes.vectorized else 'loop'})"] = None
    return {name: " and ".join(names) for name, names in kinds.items()}


def _exact_squares(passes: Passes, two: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for rows in passes.one_by_one(two, names, None, vectorized=False):
        for name, row in rows.items():
            square = row[0].square()  # gradients of two parameters may share memory
            totals[name] = totals[name].add_(square) if name in totals else square
    return totals


def _squares_by_rules(passes: Passes, two: Batch, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """All at once; one layer after the other where a layer has inputs of no known shape."""
    try:
        return passes.squares(two, Routes(layers))
    except Exception:  # of any kind: an error of the model itself has shown before
        if len(_names_in(layers)) < 2:
            return {}
    squares: dict[str, Tensor] = {}
    for name in _names_in(layers):
        squares |= _squares_by_rules(passes, two, _restricted(layers, {name}))
    return squares


def _right_as_a_whole(passes: Passes, two: Batch, layers: Sequence[Layer]) -> list[Layer]:
    """Layers with correct factors: their products give the gradient of the whole batch."""
    if passes.losses.average:  # then samples have weights, and it matters which is which
        return []
    kept = []
    for layer in layers:
        if not layer.rule.has_factors or "weight" not in layer.names:
            continue
        whole = replace(layer, whole=True)
        try:
            rules, exact = passes.gradients_of_batch(two, [whole])
        except Exception:  # of any kind: an error of the model itself has shown before
            continue
        ours, theirs = ({name: g.square() for name, g in one.items()} for one in (rules, exact))
        if _agreeing(ours, theirs, passes.calibration.space.masks()) == set(exact):
            kept.append(whole)
    return kept


def _agreeing(squares: Mapping[str, Tensor], exact: Mapping[str, Tensor], masks: Masks) -> set[str]:
    if not squares:
        return set()
    largest = torch.stack([square.max() for square in exact.values()]).max()
    right = []
    for name, square in squares.items():
        mask = masks[name].to(square)  # the rules know nothing of masks
        square, expected = square * mask, exact[name] * mask
        zero = _ROUNDING[expected.dtype] ** 2 * largest * expected.numel() ** 0.5
        half = torch.is_autocast_enabled(expected.device.type)
        agreement = _AUTOCAST_AGREEMENT if half else _AGREEMENT[expected.dtype]
        room = agreement * expected.norm() + zero
        right.append((square - expected).norm() <= room)
    # One read from the device.
    return {name for name, is_so in zip(squares, torch.stack(right).tolist(), strict=True) if is_so}


def _restricted(layers: Sequence[Layer], names: set[str]) -> list[Layer]:
    kept = [
        replace(layer, names={key: name for key, name in layer.names.items() if name in names})
        for layer in layers
    ]
    return [layer for layer in kept if layer.names]


def _expandable(
    passes: Passes, two: Batch, names: Sequence[str], exact: Mapping[str, Tensor]
) -> dict[str, int]:
    """Parameters that may be given in one copy per sample, tried jointly if of equal shape."""
    expanded: dict[str, int] = {}
    moving = torch.stack([exact[name].any() for name in names]).tolist() if names else []
    names = [
        name for name, moves in zip(names, moving, strict=True) if moves
    ]  # zeros prove nothing
    masks = passes.calibration.space.masks()
    for inserted in range(_MOST_INSERTED + 1):
        left = [name for name in names if name not in expanded]
        shapes = {name: passes.leaves[name].shape for name in left}
        if not inserted:
            shapes = {name: shape for name, shape in shapes.items() if shape[:1] == (1,)}
        for dimensions in sorted({len(shape) for shape in shapes.values()}):
            alike = {name: inserted for name in shapes if len(shapes[name]) == dimensions}
            try:
                squares = passes.squares(two, Routes(expanded=alike))
            except Exception:  # of any kind: the model does not broadcast them all so
                continue
            expanded |= dict.fromkeys(_agreeing(squares, exact, masks), inserted)
    return expanded


def _vmap_is_right(
    passes: Passes, two: Batch, names: Sequence[str], exact: Mapping[str, Tensor]
) -> bool:
    if not names:
        return False
    try:
        parts = list(passes.one_by_one(two, names, None, vectorized=True))
    except Exception:  # of any kind: the loop works
        return False
    squares = {name: torch.cat([rows[name] for rows in parts]).square().sum(0) for name in names}
    return _agreeing(squares, exact, passes.calibration.space.masks()) == set(names)


def _names_in(layers: Sequence[Layer]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in layer.names.values()))
