"""From one run of a model to its groups of units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from torchprune_bayes.costs import counted_flops
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.wiring._components import components
from torchprune_bayes.wiring._labels import Layer, Ledger, Reshape, State, solve
from torchprune_bayes.wiring._recorder import Recorder
from torchprune_bayes.wiring.forward import (
    ForwardFunction,
    at_rest,
    blaming_inputs,
    run,
    tensors_in,
)
from torchprune_bayes.wiring.groups import Role
from torchprune_bayes.wiring.tensors import all_tensors


@dataclass(frozen=True)
class Side:
    """One dimension of one tensor of a model, and its atoms.

    Attributes:
        name: First qualified name of the tensor.
        dim: The dimension.
        start: Its first atom.
        size: Number of atoms.
    """

    name: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Wiring:
    """Result of a traced run.

    Attributes:
        sides: All dimensions of parameters and of the statistics of norms.
        classes: For each atom the smallest one that is removed with it; 0 if always kept.
        roles: Role of the atoms' tensors for the units, as shown by products: 0 for
            unknown, 1 for producers, 2 for consumers.
        heads: Whether an atom's class is shared by a product inside of heads.
        reshapes: Views with sizes given by code, with classes for labels.
        used: Names of the parameters that some operation has read.
        called: Names of the modules that were called; others lend their tensors.
        widths: Modules that split a dimension into parts, with the classes along it, and where each
            part starts and stops.
        numbers: Module, attribute and the classes of the entries that it counts.
        reasons: Atoms that are always kept, and why.
        parts: For each atom the smallest one joined with it, whether kept or not.
        parametrized: Layers with a computed weight, and why they are kept.
        operations: The modules that were called and the operations that computed something, one
            after the other.
        flops: FLOPs by parameter or module, if they were counted.
    """

    sides: tuple[Side, ...]
    classes: Tensor
    roles: Tensor
    heads: Tensor
    reshapes: tuple[Reshape, ...]
    used: frozenset[str]
    called: frozenset[str]
    widths: tuple[tuple[str, Tensor, int, int], ...]
    numbers: tuple[tuple[str, str, Tensor], ...]
    reasons: tuple[tuple[Tensor, str], ...]
    parts: Tensor
    parametrized: Mapping[str, str]
    operations: tuple[str, ...]
    flops: Mapping[str, int] | None = None


OUTPUTS = "they are outputs of the model"
"""Why what a model returns stays."""


def observe(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
    *,
    whole_heads: bool = True,
    count_flops: bool = False,
) -> Wiring:
    """Run a model once to find which entries of its tensors are removed together.

    Args:
        model: The model, without wrappers; it is not changed.
        example_inputs: Inputs of the model.
        forward_fn: Another way to call it.
        whole_heads: Whether all dimensions of a head are removed together; otherwise those of all
            heads are, and the dimensions are removed separately.
        count_flops: Whether to count them, see :func:`~torchprune_bayes.costs.counted_flops`.

    Returns:
        The wiring.

    Raises:
        ArgumentError: If the model returns no floating point tensor.
        ParameterError: If the run replaces modules of the model.

    Cost: one forward pass in evaluation mode, and small tensors for each operation.
    """
    sides, states = _sides(model)
    atoms = 1 + sum(side.size for side in sides)
    inputs = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    recorder = Recorder(states, inputs)
    recorder.ledger.whole_heads = whole_heads
    modules = dict(model.named_modules())
    names: dict[int, str] = {}
    for name, tensor, _ in all_tensors(model):
        names.setdefault(id(tensor), name)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with (
        blaming_inputs(model, example_inputs, forward_fn),
        at_rest(model),
        torch.inference_mode(False),
        _transparent(recurrent),
        recorder.modules(model),
    ):
        with counted_flops(model) if count_flops else nullcontext() as counter, recorder:
            output = run(model, example_inputs, forward_fn)
        operations = tuple(recorder.operations)
        _check_modules(model, modules)
        _finish(recorder, output)
        if any(id(tensor) not in recorder.used for tensor, _ in states):
            _in_training(model, recorder, example_inputs, forward_fn)
    ledger = recorder.ledger
    _tie_recurrent(model, recorder)
    parametrized = _keep_parametrized(model, sides, ledger)
    used = frozenset(names[key] for key in recorder.used)
    classes = solve(ledger, atoms)
    for side in sides:
        if side.name not in used:
            classes[side.start : side.start + side.size] = 0
    return Wiring(
        tuple(sides),
        classes,
        _roles(ledger, atoms),
        _marked(ledger.heads, classes),
        tuple(
            Reshape(reshape.module, classes[reshape.labels], reshape.width)
            for reshape in ledger.reshapes
        ),
        used,
        frozenset(recorder.called),
        tuple(
            (cut.module, classes[cut.layer].reshape(-1), cut.start, cut.stop)
            for cut in ledger.cuts
            if cut.layer.shape[cut.dim] == cut.layer.numel()
        ),
        tuple((name, key, classes[labels]) for name, key, labels in ledger.numbers),
        tuple(ledger.reasons),
        components([_both_move(*pair) for pair in ledger.pairs], atoms),
        parametrized,
        operations,
        None if counter is None else counter.flops,
    )


def _both_move(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs without those that fix an atom."""
    both = (one > 0) & (other > 0)
    return one[both], other[both]


def _sides(model: nn.Module) -> tuple[list[Side], list[tuple[Tensor, State]]]:
    sides: list[Side] = []
    states: list[tuple[Tensor, State]] = []
    seen: set[int] = set()
    start = 1
    for prefix, module in model.named_modules():
        own = [*module._parameters.items()]
        # Buffers of other shapes are tables, masks and filters.
        vectors = [(key, buffer) for key, buffer in module._buffers.items()
                   if buffer is not None and buffer.dim() == 1]  # fmt: skip
        own += vectors
        for key, tensor in own:
            if tensor is None or id(tensor) in seen or not tensor.is_floating_point():
                continue
            seen.add(id(tensor))
            layers: list[Layer] = []
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    shape = [1] * tensor.dim()
                    shape[dim] = size
                    layers.append(torch.arange(start, start + size).reshape(shape))
                    sides.append(Side(f"{prefix}.{key}" if prefix else key, dim, start, size))
                    start += size
            states.append((tensor, State(tuple(layers), weight=True)))
    return sides, states


def _check_modules(model: nn.Module, before: Mapping[str, nn.Module]) -> None:
    for name, module in model.named_modules():
        if before.get(name) is not module:
            raise ParameterError(
                f"Expected a model that keeps its modules, got {type(model).__name__}, which put a "
                f"{type(module).__name__} at `{name}` when it ran: make this replacement before."
            )


def _finish(recorder: Recorder, output: Any) -> None:
    tensors = tensors_in(output)
    if not tensors:
        raise ArgumentError(
            f"Expected a floating point tensor from the model, got {type(output).__name__}: "
            "pass a `forward_fn` that returns one."
        )
    for tensor in tensors:
        for layer in recorder.state_of(tensor).layers:
            recorder.ledger.fix(layer, OUTPUTS)


def _tie_recurrent(model: nn.Module, recorder: Recorder) -> None:
    """Join all layers and directions of a recurrent module, which share a size."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNBase):
            continue
        sides = []
        for key in module._flat_weights_names:
            weight = module._parameters.get(key)
            layers = recorder.state_of(weight).layers if weight is not None and "_hh" in key else ()
            sides += [layer.reshape(-1) for layer in layers if layer.shape[-1] > 1 < layer.dim()]
            if module.proj_size:
                for layer in layers:
                    recorder.ledger.fix(layer, f"`{name}` projects its state")
        for side in sides[1:]:
            recorder.ledger.unite(sides[0], side)


def _keep_parametrized(model: nn.Module, sides: list[Side], ledger: Ledger) -> dict[str, str]:
    """Fix all tensors of layers with a computed weight, as in weight norm; return the reasons."""
    paths = [name for name, module in model.named_modules() if is_parametrized(module)]
    reasons = {}
    for side in sides:
        owner = side.name.rpartition(".")[0].partition("parametrizations")[0].rstrip(".")
        if owner in paths:
            labels = torch.arange(side.start, side.start + side.size)
            reasons[owner] = (
                f"`{owner or 'the model'}` is parametrized, which "
                "`torch.nn.utils.parametrize.remove_parametrizations` undoes"
            )
            ledger.fix(labels, reasons[owner])
    return reasons


def _in_training(
    model: nn.Module, recorder: Recorder, example_inputs: Any, forward_fn: ForwardFunction | None
) -> None:
    """Run the model as in training, with norms as in evaluation; skip models that refuse."""
    norms = (_NormBase, nn.modules.dropout._DropoutNd)
    for module in model.modules():
        module.training = not isinstance(module, norms)
    recorder._stack.clear()
    try:
        with recorder:
            output = run(model, example_inputs, forward_fn)
        _finish(recorder, output)
    except Exception:
        return


@contextmanager
def _transparent(recurrent: bool) -> Iterator[None]:
    """Disable fused paths that hide the operations of a module."""
    fast = torch.backends.mha.get_fastpath_enabled()
    fused = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    if recurrent:
        torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(fused)


_ROLES: tuple[Role, ...] = ("norm", "producer", "consumer")


def _roles(ledger: Ledger, atoms: int) -> Tensor:
    roles = torch.zeros(atoms, dtype=torch.int8)
    for labels, role in reversed(ledger.roles):
        roles[labels] = _ROLES.index(role)
    return roles


def _marked(labels: list[Tensor], classes: Tensor) -> Tensor:
    marked = torch.zeros(len(classes), dtype=torch.bool)
    for atoms in labels:
        marked[classes[atoms]] = True
    return marked[classes]
