"""Effect of convolutions, pooling and patches on the labels of their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchprune_bayes.wiring._labels import Layer, State, compressed, varying
from torchprune_bayes.wiring._rules import Call


def convolved(call: Call) -> State:
    """Convolutions, transposed and grouped ones too."""
    x, weight, bias = call.args[:3]
    groups, channels = int(call.args[8]), x.shape[1]
    read, made = _sides(call, weight)
    inputs = [labels for layer in call.state_of(x).layers if (labels := _channelwise(call, layer))
              is not None]  # fmt: skip
    if not inputs and channels > 1:
        inputs = [torch.zeros(channels, dtype=torch.int64)]
    if groups == channels and groups > 1:
        made = _depthwise(call, inputs, read, made)
    else:
        for labels in inputs:
            _read(call, labels, read, groups)
        made = _spread(call, made, groups)
    if made is None:
        return State()
    for layer in call.layers(bias) if isinstance(bias, Tensor) else ():
        call.ledger.unite(layer, made)
    layers = [compressed(made.reshape([1, -1] + [1] * (x.dim() - 2)))]
    return State(call.ledger.keep(layers))


def _sides(call: Call, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Labels along the dimensions that read and produce channels; kernel dimensions are fixed."""
    sides: list[Tensor | None] = [None, None]
    for layer in call.state_of(weight).layers:
        dims = varying(layer)
        if dims in ({0}, {1}):
            sides[dims.pop()] = layer.reshape(-1)
        else:
            call.ledger.fix(layer, call.reason)
    read, made = sides if call.args[6] else reversed(sides)
    if read is not None:
        call.ledger.note_role(read, "consumer")
    if made is not None:
        call.ledger.note_role(made, "producer")
    return read, made


def _channelwise(call: Call, layer: Layer) -> Tensor | None:
    """Labels with the channels at the end; labels that vary only in space are fixed."""
    if layer.shape[1] == 1:
        call.ledger.fix(layer, call.reason)
        return None
    return layer.movedim(1, -1)


def _read(call: Call, labels: Tensor, read: Tensor | None, groups: int) -> None:
    """Unite channels with the side of the weight that reads them, place by place in its group."""
    if read is None:
        call.ledger.fix(labels, call.reason)
        return
    rows = labels.reshape(*labels.shape[:-1], groups, -1)
    call.ledger.unite(rows, read.reshape(groups, -1) if call.args[6] else read)
    call.ledger.join(rows, [rows.dim() - 2])


def _spread(call: Call, made: Tensor | None, groups: int) -> Tensor | None:
    """Labels of the outputs: the same place in every group is joined."""
    if made is None or groups == 1:
        return made
    if call.args[6]:
        return made.repeat(groups)
    call.ledger.join(made.reshape(groups, -1), [0])
    return made


def _depthwise(
    call: Call, inputs: Sequence[Tensor], read: Tensor | None, made: Tensor | None
) -> Tensor | None:
    """Unite each channel with the outputs that only it produces."""
    channels, outputs = call.args[0].shape[1], call.output.shape[1]
    filters = read if call.args[6] else made
    if filters is None or outputs != channels:
        for labels in inputs:
            call.ledger.fix(labels, f"`{call.module}` filters them by constants or several times")
        for side in (read, made):
            if side is not None:
                call.ledger.fix(side, call.reason)
        return None
    for labels in inputs:
        call.ledger.unite(labels, filters)
    return filters


def spatial(call: Call) -> State | list[State]:
    """Pooling, padding and resampling over the last one, two or three dimensions."""
    x = call.args[0]
    count = next((int(digit) for digit in "123" if f"{digit}d" in call.name), x.dim() - 2)
    layers = [
        call.ledger.stiffen(layer, range(x.dim() - count, x.dim()), call.reason)
        for layer in call.state_of(x).layers
    ]
    state = State(call.ledger.keep(layers))
    count = len(call.output) if isinstance(call.output, (tuple, list)) else 1
    return [state] * count if count > 1 else state


def columns(call: Call) -> State:
    """``im2col``: a channel becomes as many rows as its window has entries."""
    x = call.args[0]
    layers = [
        call.ledger.stiffen(layer, range(2, x.dim()), call.reason)
        for layer in call.state_of(x).layers
    ]
    rows = call.output.shape[-2] // x.shape[1]
    return State(
        call.ledger.keep(
            layer.reshape(*layer.shape[:2], 1).repeat_interleave(rows, 1) for layer in layers
        )
    )
