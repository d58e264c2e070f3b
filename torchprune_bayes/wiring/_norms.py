"""Effect of normalisation on the labels of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchprune_bayes.wiring._labels import State, varying
from torchprune_bayes.wiring._rules import Call, tensors_of


def normalized(call: Call) -> State | list[State]:
    """Norms over channels one by one, in groups, or over the last dimensions."""
    x = call.args[0]
    if call.name == "native_group_norm":
        state = _group_normalized(call, x)
    elif call.name in ("native_layer_norm", "_fused_rms_norm"):
        state = _layer_normalized(call, x)
    else:
        state = _batch_normalized(call, x)
    count = len(call.output) if isinstance(call.output, (tuple, list)) else 1
    return [state] + [State()] * (count - 1) if count > 1 else state


def _batch_normalized(call: Call, x: Tensor) -> State:
    statistics = [tensor for tensor in call.args[3:5] if isinstance(tensor, Tensor)]
    if not statistics or call.args[5] is True:  # statistics of the input itself, or of a weight
        for layer in call.state_of(x).layers:
            call.ledger.stiffen(layer, [dim for dim in varying(layer) if dim != 1], call.reason)
    return _channels(call, x, [t for t in call.args[1:5] if isinstance(t, Tensor)])


def _channels(call: Call, x: Tensor, vectors: Sequence[Tensor]) -> State:
    """Unite channels along dimension 1 with vectors."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    stiff = [vector for vector in vectors if not call.state_of(vector).layers]
    layers = list(call.state_of(x).layers)
    if stiff and vectors[0].numel() > 1:
        layers = [call.ledger.stiffen(layer, [1], call.reason) for layer in layers]
    own = [layer.reshape(shape) for vector in vectors for layer in call.state_of(vector).layers]
    if own and not any(layer.shape[1] > 1 for layer in layers):
        for layer in own:
            call.ledger.fix(layer, call.reason)
    return State(call.ledger.keep(call.ledger.merge([*layers, *own])))


def _group_normalized(call: Call, x: Tensor) -> State:
    groups = int(call.args[6])
    for layer in call.state_of(x).layers:
        if layer.shape[1] > 1:
            rows = layer.movedim(1, -1).reshape(-1, groups, layer.shape[1] // groups)
            if groups == 1 or not call.module:
                call.ledger.fix(layer, call.reason)
            call.ledger.join(rows, [2])
    vectors = [vector for vector in call.args[1:3] if isinstance(vector, Tensor)]
    return _channels(call, x, vectors)


def _layer_normalized(call: Call, x: Tensor) -> State:
    dims = range(x.dim() - len(call.args[1]), x.dim())
    layers = [
        call.ledger.stiffen(layer, set(dims) & varying(layer), call.reason)
        for layer in call.state_of(x).layers
    ]
    for vector in tensors_of(call.args[2:4]):
        for layer in call.state_of(vector).layers:
            call.ledger.fix(layer, call.reason)
    return State(call.ledger.keep(layers))
