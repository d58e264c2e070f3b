"""Effect of matrix products, attention and lookups on the labels of their inputs."""

from __future__ import annotations

from torch import Tensor

from torchprune_bayes.wiring._labels import Layer, State, aligned, varying
from torchprune_bayes.wiring._rules import Call, combined, tensors_of

_BATCH, _INNER = 0, 2
_ALIGNED = 8


def multiplied(call: Call) -> State:
    """Matrix products: ``mm``, ``bmm``, ``mv`` and those that add a bias."""
    added = call.name.startswith(("add", "baddbmm"))
    one, other = call.args[1:3] if added else call.args[:2]
    state = _product(call, one, other)
    return state if not added else _with_bias(call, state, call.args[0])


def grouped(call: Call) -> State:
    """Rows of one matrix, each with one of several others: experts.

    The operation takes sizes of multiples of 16 bytes, so that eight neighbours are removed
    together.
    """
    for tensor in call.args[:2]:
        for layer in call.state_of(tensor).layers:
            for dim in varying(layer) & {tensor.dim() - 1, tensor.dim() - 2}:
                rows = layer.movedim(dim, -1)
                if rows.shape[-1] % _ALIGNED:
                    call.ledger.fix(layer, call.reason)
                else:
                    rows = rows.reshape(*rows.shape[:-1], -1, _ALIGNED)
                    call.ledger.join(rows, [rows.dim() - 1])
    return _product(call, call.args[0], call.args[1])


def _product(call: Call, one: Tensor, other: Tensor) -> State:
    """Labels over batch, rows, inner and columns; the inner ones are joined pair by pair."""
    ledger = call.ledger
    left = [_left(layer, one) for layer in call.state_of(one).layers]
    right = [_right(layer, other) for layer in call.state_of(other).layers]
    if one.dim() == 2 and other.dim() == 3:  # experts
        right = [ledger.stiffen(layer, [_BATCH], "experts stay") for layer in right]
    _note_roles(call, one, left, other, right)
    if one.shape[-1] > 1:
        left = _stiff_inner(call, left, right, other)
        right = _stiff_inner(call, right, left, one)
    if any(_BATCH in varying(b) for b in right):
        ledger.heads += [a.reshape(-1) for a in left if _BATCH in varying(a)]
    if not ledger.whole_heads:
        left, right = ([ledger.join(layer, [_BATCH]) for layer in side] for side in (left, right))
    both = {_BATCH, _INNER}
    paired = any(both <= varying(a) for a in left) and any(both <= varying(b) for b in right)
    for a in left:
        for b in right:
            if varying(a) & varying(b) & both:
                ledger.unite(a, b)
    if paired:
        left = [ledger.join(a, [_INNER]) if both <= varying(a) else a for a in left]
        right = [ledger.join(b, [_INNER]) if both <= varying(b) else b for b in right]
    by_heads = any(varying(a) == {_BATCH} for a in left) and ledger.whole_heads
    if by_heads and other.dim() == 3 and not call.state_of(other).weight:
        right = [_own_value(call, b) for b in right]
        ledger.heads += [a.reshape(-1) for a in left if varying(a) == {_BATCH}]
    outer = [layer for layer in [*left, *right] if _INNER not in varying(layer)]
    merged = [_output(layer, call.output.dim(), one, other) for layer in ledger.merge(outer)]
    weight = call.state_of(one).weight and call.state_of(other).weight
    return State(ledger.keep(merged), weight)


def _left(layer: Layer, tensor: Tensor) -> Layer:
    shape = {1: (1, 1, -1, 1), 2: (1, layer.shape[0], layer.shape[-1], 1)}
    return layer.reshape(shape.get(tensor.dim(), (*layer.shape, 1)))


def _right(layer: Layer, tensor: Tensor) -> Layer:
    if tensor.dim() == 1:
        return layer.reshape(1, 1, -1, 1)
    return layer.reshape(1 if layer.dim() == 2 else layer.shape[0], 1, *layer.shape[-2:])


def _output(layer: Layer, dims: int, one: Tensor, other: Tensor) -> Layer:
    b, m, _, n = layer.shape
    if dims == 3:
        return layer.reshape(b, m, n)
    if other.dim() == 1:
        return layer.reshape(m)
    return layer.reshape(m, n)


def _stiff_inner(
    call: Call, layers: list[Layer], others: list[Layer], other: Tensor
) -> list[Layer]:
    """Stiffen the inner dimension where the other factor has a fixed size there."""
    if any(_INNER in varying(layer) for layer in others) or call.state_of(other).pliable:
        return layers
    reason = f"`{call.name}` in `{call.module}` multiplies by a constant"
    return [call.ledger.stiffen(layer, [_INNER], reason) for layer in layers]


def _note_roles(
    call: Call, one: Tensor, left: list[Layer], other: Tensor, right: list[Layer]
) -> None:
    if call.state_of(other).weight:
        call.ledger.note_roles(right, _INNER)
    elif call.state_of(one).weight:
        call.ledger.note_roles(left, _INNER)


def _with_bias(call: Call, state: State, bias: Tensor) -> State:
    layers = [*state.layers, *call.layers(bias, call.output.dim())]
    if call.state_of(bias).weight:
        for layer in call.layers(bias):
            call.ledger.note_role(layer, "producer")
    return State(call.ledger.keep(call.ledger.merge(layers)), state.weight)


def attended(call: Call) -> State | list[State]:
    """Scaled dot product attention: queries, keys and values ``[..., heads, tokens, width]``."""
    ledger = call.ledger
    query, key, value = call.args[:3]
    dims = query.dim()
    width = [dims - 1] if ledger.whole_heads else []
    scores: list[Layer] = []
    for tensor in (query, key):
        for layer in call.state_of(tensor).layers:
            stiff = ledger.stiffen(layer, [*width, dims - 2], call.reason)
            scores.append(_repeated(stiff, tensor, query))
    values = [
        _repeated(ledger.stiffen(layer, [dims - 2], call.reason), value, query)
        for layer in call.state_of(value).layers
    ]
    if not ledger.whole_heads:
        _pair_dimensions(call, query, key)
        scores = []
        values = [ledger.join(layer, range(dims - 2)) for layer in values]
    elif any(varying(layer) for layer in scores):
        values = [_own_value(call, layer) for layer in values]
    masks = [
        tensor for tensor in tensors_of([*call.args[3:], *call.kwargs.values()]) if tensor.dim() > 1
    ]
    for mask in masks:
        scores += [
            ledger.stiffen(layer, [dims - 1, dims - 2], call.reason)
            for layer in call.layers(mask, dims)
        ]
    ledger.heads += [layer.reshape(-1) for layer in scores if varying(layer)]
    state = State(ledger.keep(ledger.merge([*scores, *values])))
    count = len(call.output) if isinstance(call.output, (tuple, list)) else 1
    return [state] + [State()] * (count - 1) if count > 1 else state


def _own_value(call: Call, layer: Layer) -> Layer:
    """Keep a value whole that all heads share, so that heads can be removed without it."""
    if varying(layer) == {layer.dim() - 1}:
        return call.ledger.stiffen(layer, varying(layer), f"all heads in `{call.module}` share it")
    return layer


def _pair_dimensions(call: Call, query: Tensor, key: Tensor) -> None:
    """Join each dimension of a query, in all heads, with that of the keys."""
    sides = []
    for tensor in (query, key):
        layers = [
            call.ledger.join(layer, range(layer.dim() - 1))
            for layer in call.state_of(tensor).layers
        ]
        sides.append([layer for layer in layers if varying(layer)])
    for layers, others in (sides, reversed(sides)):
        for layer in layers:
            for other in others:
                call.ledger.unite(layer, other)
            if not others:
                call.ledger.fix(layer, call.reason)


def _repeated(layer: Layer, tensor: Tensor, query: Tensor) -> Layer:
    """Repeat heads of keys and values for the queries that share them."""
    heads = query.dim() - 3
    if heads < 0 or layer.shape[heads] == 1 or tensor.shape[heads] == query.shape[heads]:
        return layer
    return layer.repeat_interleave(query.shape[heads] // tensor.shape[heads], heads)


def embedded(call: Call) -> State:
    """Rows of a table by index: rows are fixed, columns label the last dimension."""
    layers = []
    for layer in call.state_of(call.args[0]).layers:
        layer = call.ledger.stiffen(layer, [0], call.reason)
        if layer.shape[1] > 1:
            call.ledger.note_role(layer.reshape(-1), "producer")
            layers.append(aligned(layer.reshape(-1), call.output.dim()))
    weight = call.state_of(call.args[0]).weight and call.state_of(call.args[1]).weight
    return State(call.ledger.keep(layers), weight)


def gated(call: Call) -> State:
    """``glu``: the second half scales the first."""
    x = call.args[0]
    dim = int(call.argument(1, "dim", -1)) % x.dim()
    halves = []
    for layer in call.state_of(x).layers:
        if layer.shape[dim] > 1:
            one, other = layer.chunk(2, dim)
            call.ledger.unite(one, other)
            layer = one
        halves.append(layer)
    return State(call.ledger.keep(halves))


def written(call: Call) -> State:
    """Writing into a tensor in place."""
    target, source = call.args[:2]
    if call.state_of(target).layers:
        return combined(call, [target, source])
    state = call.state_of(source)
    if target.shape == source.shape and not target._is_view():
        return state
    for layer in state.layers:
        call.ledger.fix(layer, f"`{call.module}` writes them into a tensor of its own")
    return State()


def added_at(call: Call) -> State:
    """``index_add``: rows of one tensor are added to rows of another."""
    target, dim, _, source = call.args[:4]
    layers = [
        call.ledger.stiffen(layer, [dim % target.dim()], call.reason)
        for layer in [*call.state_of(target).layers, *call.state_of(source).layers]
    ]
    return State(call.ledger.keep(call.ledger.merge(layers)))
