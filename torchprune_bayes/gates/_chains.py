"""Places for gates in a chain of layers, which is told from its code without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.gates.site import Site, activation_dim, entries_of
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.wiring.forward import at_rest

_SIZES = ("size", "shape", "dim", "ndim", "numel", "dtype", "device")


def chain_sites(model: nn.Module) -> Iterator[Site]:
    """Yield a site behind each layer but the last, or in front of the next one.

    That is where the activation in between makes constants of zeros; a layer whose units the next
    one reads in several entries then gets none.

    Raises:
        ArgumentError: If the model is no chain.
    """
    layers = list(_layers(model))
    sites = list(_in_order(layers))
    if not sites:
        return
    graph = check_chain(model)
    weighty = [name for name, layer in layers if not kind_of(layer).is_norm]
    for site in sites:
        if site.side == "in" or _silent(model, graph, site, weighty):
            yield site
            continue
        reader = weighty[weighty.index(site.producer or site.module) + 1]
        if entries_of(model.get_submodule(reader), "in") == site.units:
            yield replace(site, module=reader, side="in")


def _silent(model: nn.Module, graph: fx.Graph, site: Site, layers: list[str]) -> bool:
    """Whether the operations between a site and the next layer let zeros through as zeros.

    Changes of the shape do, and are left out, since the size of the model's inputs is not known.
    """
    nodes = iter(graph.nodes)
    start = next(node for node in nodes if node.op == "call_module" and node.target == site.module)
    sides = (16, 16) if site.kind == "channel" else ()
    parameter = next(model.parameters())
    values: dict[fx.Node, Any] = {start: parameter.new_zeros(2, site.units, *sides)}
    runner = fx.Interpreter(fx.GraphModule(model, graph), garbage_collect_values=False)
    with at_rest(model):
        for node in nodes:
            if node.op == "call_module" and node.target in layers:
                value = values.get(node.all_input_nodes[0])
                return isinstance(value, Tensor) and not bool(value.any())
            try:
                values[node] = _followed(runner, node, values)
            except Exception:
                return False
    return False


def _followed(runner: fx.Interpreter, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node."""
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    shapes = node.target in _RESHAPING or isinstance(_module_of(runner, node), nn.Flatten)
    if first is not None and shapes:
        return values[first]
    given = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return getattr(runner, node.op)(node.target, *given)


def _module_of(runner: fx.Interpreter, node: fx.Node) -> nn.Module | None:
    return runner.fetch_attr(str(node.target)) if node.op == "call_module" else None


_RESHAPING = ("view", "reshape", "flatten", "squeeze", torch.flatten, torch.reshape, torch.squeeze)


def check_chain(model: nn.Module) -> fx.Graph:
    """Refuse a model in which several layers read one value, or layers run in another order.

    The code is followed symbolically (:mod:`torch.fx`); numbers computed from a value's shape do
    not count as reading it.

    Returns:
        Its operations.

    Raises:
        ArgumentError: If it is no chain, or its code cannot be followed.

    Example:
        >>> graph = check_chain(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        >>> [node.op for node in graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'call_module', 'output']
    """
    remedy = "give `example_inputs` to preset 'auto', which sees its wiring, or name the sites"
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ArgumentError(
            f"Expected a chain of layers, got {type(model).__name__}, whose code cannot be "
            f"followed without running it ({type(error).__name__}): {remedy}."
        ) from error
    problem = _branching(graph) or _order(model, graph)
    if problem:
        raise ArgumentError(
            f"Expected a chain of layers, got {type(model).__name__}, {problem}: {remedy}."
        )
    return graph


def _branching(graph: fx.Graph) -> str | None:
    """Where several operations read one value, or one operation reads several."""
    numbers: set[fx.Node] = set()
    for node in graph.nodes:
        size = node.op.startswith("call") and (node.target in _SIZES or node.target is getattr)
        if size or (node.all_input_nodes and numbers.issuperset(node.all_input_nodes)):
            numbers.add(node)
    for node in graph.nodes:
        if node in numbers or node.op == "get_attr":
            continue
        if len([user for user in node.users if user not in numbers]) > 1:
            return f"in which several operations read `{node.name}`"
        if len([source for source in node.all_input_nodes if source not in numbers]) > 1:
            return f"in which `{node.name}` combines several values"
    return None


def _order(model: nn.Module, graph: fx.Graph) -> str | None:
    """Whether layers run several times, or not as they were registered."""
    called = [
        str(node.target)
        for node in graph.nodes
        if node.op == "call_module" and [*model.get_submodule(str(node.target)).parameters()]
    ]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    if len(set(called)) < len(called) or called != sorted(called, key=order.__getitem__):
        return "whose layers do not run once each in the order in which they were registered"
    return None


def _in_order(layers: list[tuple[str, nn.Module]]) -> Iterator[Site]:
    """Sites of layers in the order in which they were registered."""
    weighty = [i for i, (_, layer) in enumerate(layers) if not kind_of(layer).is_norm]
    for index, following in pairwise(weighty):
        name, layer = layers[index]
        norm_name, norm = layers[index + 1]
        next_name, successor = layers[following]
        units = entries_of(layer, "out")
        assert units is not None
        kind = "hidden" if activation_dim(layer) == -1 else "channel"
        if kind_of(norm).is_norm:
            # Norms over units mix them, so that none can be gated or removed on its own.
            if entries_of(norm, "out") == units:
                yield Site(norm_name, "out", units, kind=kind, producer=name)
        elif kind == "channel":
            yield Site(name, "out", units, kind=kind, producer=name)
        elif activation_dim(successor) == -1 and units == entries_of(successor, "in"):
            yield Site(next_name, "in", units, producer=name)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    attention = [name for name, m in model.named_modules() if "Attention" in type(m).__name__]
    for name, module in model.named_modules():
        gateable = kind_of(module).is_norm or entries_of(module, "out") is not None
        if gateable and not any(f"{name}.".startswith(f"{outer}.") for outer in attention):
            yield name, module
