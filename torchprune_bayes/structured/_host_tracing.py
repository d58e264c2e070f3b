"""Running torch-pruning's tracing so that the model does not notice, and only for so long."""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torchprune_bayes._extras import optional
from torchprune_bayes.calibration._randomness import IsolatedRandomness
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.structured._forward import ForwardFunction, run, tensors_in


class Trace:
    """The coupled layers of a model, as torch-pruning sees them.

    Attributes:
        model: A copy of the traced model that shares its parameters' memory.
    """

    def __init__(
        self, model: nn.Module, graph: Any, outputs: list[Tensor], calls: Counter[nn.Module]
    ) -> None:
        self.model = model
        self._graph = graph
        self._outputs = {output.grad_fn for output in outputs}
        places = [
            (parameter, module)
            for module in model.modules()
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        count = Counter(id(parameter) for parameter, _ in places)
        tied = {module for parameter, module in places if count[id(parameter)] > 1}
        self._shared = tied | {module for module, times in calls.items() if times > 1}
        self._owners = {id(parameter): module for parameter, module in places}

    def groups(self) -> Iterator[Any]:
        """Yield all groups with all their indices, in the host's order.

        Raises:
            ArgumentError: If the time is up.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from self._graph.get_all_groups()

    def is_safe(self, group: Any) -> bool:
        """Whether units of a group can go without a change in what the others compute.

        Not so if they are outputs of the model, if a norm takes its statistics over all units, or
        if a layer runs more than once or shares its parameters.
        """
        return not any(
            self._owner(item.dep.target.module) in self._shared
            or _mixes(self._owner(item.dep.target.module))
            or self._is_output(item.dep)
            for item in group
        )

    def _owner(self, target: Any) -> Any:
        """The module itself, or the one that a bare parameter belongs to."""
        return self._owners.get(id(target), target) if isinstance(target, Tensor) else target

    def _is_output(self, dependency: Any) -> bool:
        module = dependency.target.module
        reads = dependency.handler.__name__ == "prune_in_channels"
        own = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        return dependency.target.grad_fn in self._outputs and not (own and reads)


def trace(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
    timeout_seconds: float,
) -> Trace:
    """Trace a model with one forward pass in evaluation mode.

    Args:
        model: The model, without wrappers; nothing in it changes.
        example_inputs: What it is called with.
        forward_fn: How to call it otherwise.
        timeout_seconds: Limit for listing the groups afterwards.

    Raises:
        MissingExtraError: If torch-pruning is not installed.
        ArgumentError: If the model gives no tensor that depends on a parameter.
    """
    graph_class = _dependency_graph()
    with torch.inference_mode(False):
        twin = sharing_copy(model)
    outputs: list[Tensor] = []

    def differentiable(output: Any) -> list[Tensor]:
        outputs.extend(tensor for tensor in tensors_in(output) if tensor.grad_fn is not None)
        if not outputs:
            raise ArgumentError(
                "Expected an output that depends on the parameters, got none in "
                f"{type(output).__name__}."
            )
        return outputs

    device = next((parameter.device for parameter in twin.parameters()), None)
    with (
        IsolatedRandomness(0, device),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
        _counted_calls(twin) as calls,
    ):
        warnings.simplefilter("ignore")
        graph = graph_class().build_dependency(
            twin,
            example_inputs,
            forward_fn=lambda model, inputs: run(model, inputs, forward_fn),
            output_transform=differentiable,
            verbose=False,
        )
    _limit(graph, timeout_seconds)
    return Trace(twin, graph, outputs, calls)


def _dependency_graph() -> Any:
    with optional("torch-pruning", "torch-pruning"):
        from torch_pruning import DependencyGraph
    return DependencyGraph


@contextmanager
def _counted_calls(model: nn.Module) -> Iterator[Counter[nn.Module]]:
    """Count how often each module with parameters of its own runs."""
    calls: Counter[nn.Module] = Counter()
    with ExitStack() as stack:
        for module in model.modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                hook = module.register_forward_hook(lambda module, _, __: calls.update([module]))
                stack.callback(hook.remove)
        yield calls


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy with its own modules and buffers whose parameters share the model's memory.

    All its floating point parameters require gradients, so that tracing sees frozen layers.

    Raises:
        ParameterError: If the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shared = nn.Parameter(parameter.detach(), requires_grad=parameter.is_floating_point())
        shared.grad = parameter.grad
        memo[id(parameter)] = shared
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ParameterError(
            f"Expected a model that `copy.deepcopy` can copy, got: {error}"
        ) from error


def _limit(graph: Any, timeout_seconds: float) -> None:
    """Let every step of the host's search for coupled layers look at the clock."""
    deadline = time.monotonic() + timeout_seconds

    def step(triggered: Any, function: Any) -> bool:
        if time.monotonic() > deadline:
            raise ArgumentError(
                f"Expected the coupled layers to be found within {timeout_seconds:g} seconds, got "
                "no end: the model may wire units in a way that tracing cannot follow; ignore the "
                "layers concerned, pass `groups`, or raise `timeout_seconds`."
            )
        return bool(triggered(function))

    for node in graph.module2node.values():
        for dependency in node.dependencies:
            dependency.is_triggered_by = partial(step, dependency.is_triggered_by)


def _mixes(module: Any) -> bool:
    """Whether a norm takes its statistics over all units, as all but these three kinds do."""
    apart = isinstance(module, (_NormBase, nn.GroupNorm))
    return "norm" in type(module).__name__.lower() and not apart
