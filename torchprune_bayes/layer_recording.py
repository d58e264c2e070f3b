"""Hooks that note, in one forward pass, what the gradients of single samples are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchprune_bayes.layer_kinds import LayerKind, SampleGradients, kind_of
from torchprune_bayes.layer_kinds.gradients import DenseGradients
from torchprune_bayes.params import ParameterSpace, leaf


@dataclass(frozen=True)
class Layer:
    """A layer whose kind can compute gradients, and those of its parameters that need them."""

    module: nn.Module
    rule: LayerKind
    names: Mapping[str, str]
    """Qualified names by the names in the layer."""
    whole: bool = False
    """Whether a batch counts as one sample, whichever input dimension is the batch.

    That is enough for Kronecker factors, which are sums over samples and positions alike.
    """


@dataclass
class _Call:
    """One call of one layer."""

    layer: Layer
    saved: Any
    edge: GradientEdge
    """Where its output is in the graph; the output itself may be overwritten in place."""


@dataclass
class Recording:
    """The calls of one forward pass.

    Attributes:
        samples: ``B``, samples of the batch; or its mini-batches.
        group: Samples of a mini-batch, side by side; one where every sample is its own.
        calls: Calls in order, for as long as they are needed.
        unbatched: Qualified names of parameters of layers whose inputs were no multiple of ``B``.
    """

    samples: int
    group: int = 1
    calls: list[_Call] = field(default_factory=list)
    unbatched: set[str] = field(default_factory=set)

    def sample_gradients(
        self, scalar: Tensor, factors: Tensor | None, *, keep_graph: bool = False
    ) -> Iterator[tuple[str, list[SampleGradients]]]:
        """Yield parameters with the uses of them, from one backward pass.

        Args:
            scalar: What is differentiated.
            factors: ``[B]``, multiplied with the gradients of the samples; all equal where a
                batch counts as one sample.
            keep_graph: Whether more backward passes follow; otherwise memory is freed early.
        """
        calls = self.calls if keep_graph else self._taken()
        edges = [call.edge for call in calls]
        edge_gradients: list[Tensor | None] = list(
            torch.autograd.grad(scalar, edges, retain_graph=keep_graph, allow_unused=True)
            if edges
            else []
        )
        ready: dict[str, list[SampleGradients]] = {}
        left = _times_used(calls)
        for index, call in enumerate(calls):
            g, edge_gradients[index] = edge_gradients[index], None
            for name, gradients in self._of_call(call, g, factors).items():
                ready.setdefault(name, []).append(gradients)
            for name in call.layer.names.values():
                left[name] -= 1
                if not left[name] and name in ready:
                    yield name, ready.pop(name)

    def expand(self, name: str, values: Tensor, inserted: int) -> Tensor:
        """One copy of a parameter per sample, for models that broadcast it over the samples.

        Args:
            name: Its qualified name.
            values: The parameter.
            inserted: Dimensions to put before the parameter's own, the samples' included; with 0
                the samples take the place of a first dimension of one.
        """
        kept = values.shape if inserted else values.shape[1:]
        between = [1] * (inserted - 1)
        copies = values.detach().reshape(1, *between, *kept)
        copies = copies.expand(self.samples, *between, *kept).requires_grad_()
        layer = Layer(nn.Identity(), _ExpandedKind(), {"values": name})
        self.calls.append(_Call(layer, values.shape, get_gradient_edge(copies)))
        return copies.repeat_interleave(self.group, 0) if self.group > 1 else copies

    def _of_call(
        self, call: _Call, g: Tensor | None, factors: Tensor | None
    ) -> dict[str, SampleGradients]:
        if g is None:
            return {}
        layer = call.layer
        samples = 1 if layer.whole else self.samples
        if factors is not None:
            scale = factors[:samples].repeat_interleave(len(g) // samples).to(g)
            g = g * scale.view(-1, *[1] * (g.ndim - 1))
        by_name = layer.rule.gradients(layer.module, call.saved, g, samples)
        return {qualified: by_name[name] for name, qualified in layer.names.items()}

    def _taken(self) -> list[_Call]:
        calls, self.calls = self.calls, []
        return calls


class _ExpandedKind(LayerKind):
    """A parameter that was expanded to one copy per sample."""

    names = ("values",)

    def matches(self, module: nn.Module) -> bool:
        return False

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        return {"values": DenseGradients(g.reshape(samples, *saved))}


def layers_of(space: ParameterSpace) -> list[Layer]:
    """The layers with a rule that use tensors of ``space``, tied ones under their one name."""
    names = {id(tensor.leaf): tensor.name for tensor in space}
    layers = []
    for module in space.model.modules():
        kind = kind_of(module)
        if not kind.has_gradients(module):
            continue
        leaves = {name: id(leaf(module, name)) for name in kind.names}
        ours = {name: names[key] for name, key in leaves.items() if key in names}
        if ours:
            layers.append(Layer(module, kind, ours))
    return layers


@contextmanager
def recorded(layers: Sequence[Layer], samples: int, group: int = 1) -> Iterator[Recording]:
    """Record the layers that are called inside; the hooks are gone afterwards."""
    recording = Recording(samples, group)
    with ExitStack() as stack:
        for layer in layers:
            hook = partial(_record, recording, layer)
            handle = layer.module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield recording


def _record(
    recording: Recording,
    layer: Layer,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Tensor | None:
    inputs = [*args, *kwargs.values()][0]
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    samples, shared = 1 if layer.whole else recording.samples, False
    rows = samples * recording.group
    if len(inputs) == 1 and rows > 1 and not layer.whole:
        # The same for all samples, such as embeddings of positions: the model goes on to broadcast
        # it, and an expanded output has the same values and one gradient per sample.
        inputs, output = (t.expand(rows, *t.shape[1:]) for t in (inputs, output))
        shared = True
    if len(inputs) % samples or len(output) % samples:
        recording.unbatched.update(layer.names.values())
        return None
    saved = layer.rule.saved(module, inputs)
    recording.calls.append(_Call(layer, saved, get_gradient_edge(output)))
    return output if shared else None


def _times_used(calls: Sequence[_Call]) -> dict[str, int]:
    times: dict[str, int] = {}
    for call in calls:
        for name in call.layer.names.values():
            times[name] = times.get(name, 0) + 1
    return times
