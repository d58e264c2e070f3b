"""Effect of operations on the labels of their inputs: elementwise, moving and reducing ones.

In plain words: elementwise operations unite the labels of the entries they combine. Operations that
only move entries move the labels in the same way. Operations that reduce over entries, such as a
sum over a dimension, join the labels of these entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchprune_bayes.wiring._labels import (
    Cut,
    Layer,
    Ledger,
    Reshape,
    State,
    aligned,
    compressed,
    varying,
)


@dataclass
class Call:
    """One call of an operation.

    Attributes:
        operation: The operation of ``torch.ops.aten``.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        module: Qualified name of the module that is running.
        ledger: Where to record joined atoms.
        state_of: Returns the state of a tensor.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    module: str
    ledger: Ledger
    state_of: Callable[[Tensor], State]

    @property
    def name(self) -> str:
        """Name of the operation without its overload."""
        return str(self.operation.overloadpacket.__name__)

    @property
    def reason(self) -> str:
        """Why the operation keeps units from being removed one by one."""
        return f"`{self.name}` in `{self.module or 'the model'}` takes them all together"

    def argument(self, place: int, key: str, default: Any = None) -> Any:
        """Return an argument by place or keyword."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(key, default)

    def layers(self, tensor: Tensor, dims: int | None = None) -> tuple[Layer, ...]:
        """Return the layers of a tensor, aligned to a number of dimensions."""
        layers = self.state_of(tensor).layers
        return layers if dims is None else tuple(aligned(layer, dims) for layer in layers)


Rule: TypeAlias = Callable[[Call], "State | Sequence[State]"]


def is_stiff(tensor: Tensor, state: State, dim: int) -> bool:
    """Whether the size of a tensor along a dimension is independent of other tensors."""
    return tensor.shape[dim] > 1 and tensor.stride(dim) != 0 and not state.pliable


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments, also inside of lists."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += tensors_of(value)
    return tensors


def elementwise(call: Call) -> State:
    """Unite the labels of all tensors that are combined entry by entry."""
    return combined(call, tensors_of([*call.args, *call.kwargs.values()]))


def combined(call: Call, tensors: Sequence[Tensor]) -> State:
    """Unite the labels of tensors after broadcasting."""
    dims = max((tensor.dim() for tensor in tensors), default=0)
    tensors = [tensor for tensor in tensors if tensor.dim()]
    states = [call.state_of(tensor) for tensor in tensors]
    own = [[aligned(layer, dims) for layer in state.layers] for state in states]
    shapes = [tensor.reshape([1] * (dims - tensor.dim()) + list(tensor.shape)) if
              tensor.dim() < dims else tensor for tensor in tensors]  # fmt: skip
    _shared_scales(call, states, own, shapes)
    merged = call.ledger.merge([layer for layers in own for layer in layers])
    result = []
    for layer in merged:
        for tensor, state, layers in zip(shapes, states, own, strict=True):
            labelled = {dim for mine in layers for dim in varying(mine)}
            stiff = [dim for dim in varying(layer) - labelled if is_stiff(tensor, state, dim)]
            layer = call.ledger.stiffen(
                layer, stiff, f"`{call.name}` in `{call.module}` combines them with what stays"
            )
        result.append(layer)
    return State(
        call.ledger.keep(result),
        weight=all(state.weight for state in states),
        pliable=all(state.pliable for state in states),
    )


def _shared_scales(
    call: Call, states: list[State], own: list[list[Layer]], tensors: list[Tensor]
) -> None:
    """Keep whole what scales all heads alike: the norm of a query, the angles of positions."""
    for index, (state, tensor) in enumerate(zip(states, tensors, strict=True)):
        if not state.weight:
            continue
        for scale in list(own[index]):
            dims = varying(scale)
            for other, layers in enumerate(own):
                for place, layer in enumerate(layers):
                    more = varying(layer) - dims
                    alike = dims <= varying(layer) and all(tensor.shape[dim] == 1 for dim in more)
                    if other != index and more and alike and not states[other].weight:
                        call.ledger.fix(scale, "every head is scaled alike")
                        layers[place] = call.ledger.stiffen(layer, dims, call.reason)
                        own[index] = [mine for mine in own[index] if mine is not scale]


def same(call: Call) -> State:
    """Copies, casts and the like."""
    return call.state_of(call.args[0])


def moved(call: Call) -> State | list[State]:
    """Move labels as the entries are moved."""
    x = call.args[0]
    state = call.state_of(x)
    several = isinstance(call.output, (list, tuple))
    outputs = list(call.output) if several else [call.output]
    moved_layers: list[list[Layer]] = [[] for _ in outputs]
    for layer in state.layers:
        if call.name == "constant_pad_nd" and not varying(layer) & _padded(call, x):
            moved_layers[0].append(layer)
            continue
        full = layer.expand(x.shape)
        if call.name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
            labels = [full.reshape(outputs[0].shape)]
        else:
            result = call.operation(full, *call.args[1:], **call.kwargs)
            labels = list(result) if several else [result]
        for place, label in enumerate(labels):
            moved_layers[place].append(compressed(label))
        if call.name in ("view", "_unsafe_view", "reshape"):
            _note_reshape(call, layer, moved_layers[0][-1])
    states = [
        State(call.ledger.keep(layers), state.weight, state.pliable) for layers in moved_layers
    ]
    return states if several else states[0]


def _padded(call: Call, x: Tensor) -> set[int]:
    pads = list(call.args[1])
    return {x.dim() - 1 - place // 2 for place, pad in enumerate(pads) if pad}


def _note_reshape(call: Call, before: Layer, after: Layer) -> None:
    """Record where a labelled dimension is split into several, or several are merged."""
    if len(varying(before)) != len(varying(after)):
        width = max([*before.shape, *after.shape])
        call.ledger.reshapes.append(Reshape(call.module, after, width))


def parted(call: Call) -> State | list[State]:
    """Move labels, recording where a labelled dimension is split."""
    x = call.args[0]
    for layer in call.state_of(x).layers:
        for dim, start, stop, step in _parts(call, x):
            if layer.shape[dim] > 1 and stop - start < x.shape[dim]:
                call.ledger.cuts.append(Cut(layer, dim, start, stop, step, call.module))
    return moved(call)


def _parts(call: Call, x: Tensor) -> list[tuple[int, int, int, int]]:
    if call.name in ("select", "slice", "narrow"):
        dim = int(call.argument(1, "dim", 0)) % x.dim()
        size = x.shape[dim]
        if call.name == "select":
            start = int(call.argument(2, "index", 0)) % size
            return [(dim, start, start + 1, 1)]
        start = call.argument(2, "start", 0) or 0
        start = max(start + size, 0) if start < 0 else min(start, size)
        step = int(call.argument(4, "step", 1) or 1)
        return [(dim, start, start + call.output.shape[dim] * step, step)]
    dim = int(call.argument(1 if call.name == "unbind" else 2, "dim", 0)) % x.dim()
    parts, start = [], 0
    for output in call.output:
        width = 1 if call.name == "unbind" else output.shape[dim]
        parts.append((dim, start, start + width, 1))
        start += width
    return parts


def looked_up(call: Call) -> State:
    """Entries at positions given by the code or the data, which are fixed."""
    x, dims = call.args[0], set()
    if call.name == "index":
        places = [place for place, index in enumerate(call.args[1]) if index is not None]
        flags = {torch.bool, torch.uint8}
        if any(call.args[1][place].dtype in flags for place in places):
            return everything(call)
        dims = set(places)
    else:
        dims = {int(call.args[1]) % x.dim()}
    layers = []
    for layer in call.state_of(x).layers:
        layer = call.ledger.stiffen(layer, dims & varying(layer), call.reason)
        layers.append(layer)
    state = call.state_of(x)
    result = []
    for layer in layers:
        if call.name == "gather":
            if any(call.output.shape[dim] != x.shape[dim] for dim in varying(layer)):
                call.ledger.fix(layer, call.reason)
                continue
            result.append(layer)
        else:
            result.append(compressed(call.operation(layer.expand(x.shape), *call.args[1:])))
    return State(call.ledger.keep(result), state.weight)


def reduced(call: Call) -> State | list[State]:
    """Sums, means and norms over dimensions."""
    x = call.args[0]
    place = 2 if call.name == "linalg_vector_norm" else 1
    dims = call.argument(place, "dim")
    if isinstance(dims, float) or call.name == "norm":
        dims = call.argument(2, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    axes = {dim % max(x.dim(), 1) for dim in (dims if dims else range(x.dim()))}
    outputs = tensors_of([call.output])
    state = call.state_of(x)
    layers = [
        without(call.ledger.stiffen(layer, axes & varying(layer), call.reason), axes,
                keep=outputs[0].dim() == x.dim())
        for layer in state.layers
    ]  # fmt: skip
    result = State(call.ledger.keep(layers), state.weight)
    return [result] * len(outputs) if isinstance(call.output, (tuple, list)) else result


def without(layer: Layer, dims: Iterable[int], *, keep: bool) -> Layer:
    """Return a layer without dimensions along which it does not vary."""
    return layer if keep else layer.squeeze(tuple(dims))


def along(call: Call) -> State | list[State]:
    """Softmax, running sums and sorting along a dimension."""
    x = call.args[0]
    places = {"topk": 2, "kthvalue": 2}
    dim = call.argument(places.get(call.name, 1), "dim", -1)
    dim = -1 if isinstance(dim, bool) else int(dim)
    axis = dim % max(x.dim(), 1)
    state = call.state_of(x)
    layers = [
        call.ledger.stiffen(layer, {axis} & varying(layer), call.reason) for layer in state.layers
    ]
    result = State(call.ledger.keep(layers), state.weight)
    count = len(tensors_of([call.output]))
    return [result] * count if isinstance(call.output, (tuple, list)) else result


def concatenated(call: Call) -> State:
    """Several tensors one after the other, or stacked along a new dimension."""
    tensors = [t for t in call.args[0] if t.dim() > 1 or t.numel()]
    dims = call.output.dim()
    dim = int(call.argument(1, "dim", 0)) % dims
    states = [call.state_of(tensor) for tensor in tensors]
    own = [list(state.layers) for state in states]
    if call.name == "stack":
        tensors = [tensor.unsqueeze(dim) for tensor in tensors]
        own = [[layer.unsqueeze(dim) for layer in layers] for layers in own]
    result = []
    for axes in _clusters([varying(layer) for layers in own for layer in layers]):
        parts = []
        sizes = [1] * dims
        for axis in axes - {dim}:
            sizes[axis] = call.output.shape[axis]
        related = [layer for layers in own for layer in layers if varying(layer) & axes]
        for tensor, state, layers in zip(tensors, states, own, strict=True):
            mine = call.ledger.merge([layer for layer in layers if varying(layer) & axes])
            sizes[dim] = tensor.shape[dim]
            stiff = any(is_stiff(tensor, state, axis) for axis in axes - {dim})
            if mine:
                parts.append(mine[0].expand(sizes))
            elif axes - {dim} and not stiff:
                parts.append(related[0].narrow(dim, 0, 1).expand(sizes))
            else:
                parts.append(torch.zeros(1, dtype=torch.int64).expand(sizes))
        result.append(compressed(torch.cat(parts, dim)))
    return State(
        call.ledger.keep(result),
        weight=all(state.weight for state in states),
        pliable=all(state.pliable for state in states),
    )


def _clusters(sets: Iterable[set[int]]) -> list[set[int]]:
    """Unite sets that overlap."""
    done: list[set[int]] = []
    for axes in sets:
        apart = [other for other in done if not other & axes]
        done = [*apart, axes.union(*(other for other in done if other & axes))]
    return done


def everything(call: Call) -> State:
    """An unknown operation: all its inputs are fixed."""
    for tensor in tensors_of([*call.args, *call.kwargs.values()]):
        for layer in call.state_of(tensor).layers:
            call.ledger.fix(
                layer, f"`{call.name}` in `{call.module or 'the model'}` is not understood"
            )
    return State()
