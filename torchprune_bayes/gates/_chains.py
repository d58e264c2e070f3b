"""Whether a model is a chain of layers, decided from its code without running it."""

from __future__ import annotations

from torch import fx, nn

from torchprune_bayes.errors import ArgumentError

_SIZES = ("size", "shape", "dim", "ndim", "numel", "dtype", "device")


def check_chain(model: nn.Module) -> None:
    """Refuse a model in which several layers read one value, or layers run in another order.

    The code is followed symbolically (:mod:`torch.fx`); numbers computed from a value's shape do
    not count as reading it.

    Raises:
        ArgumentError: If it is no chain, or its code cannot be followed.

    Example:
        >>> check_chain(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    """
    remedy = "give `example_inputs`, on which its wiring is seen, or name the sites"
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
