"""Latency and memory as functions of the remaining units, measured on this machine.

In plain words: the latency of a model of certain sizes is measured by cutting a copy to these sizes
and running it alternately with the whole one. Prices of units come from halving one group at a
time; the number of units to remove for a target latency is found by search.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice
from torchprune_bayes.structured._replacement import Change
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.slicing import apply_plan, plan_of
from torchprune_bayes.structured.unit_costs import Resource, Units
from torchprune_bayes.wiring.clock import seconds_of
from torchprune_bayes.wiring.forward import ForwardFunction, at_rest, run

MeasuredKind: TypeAlias = Literal["latency", "memory"]

MEASURED = ("latency", "memory")
_PAIRS, _LEAST_PRICE = 9, 1e-3


class Repeated(NamedTuple):
    """A repeated measurement.

    Attributes:
        value: Its median.
        low: Its lower quartile.
        high: Its upper quartile.
    """

    value: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Distance of the quartiles, relative to the median."""
        return (self.high - self.low) / self.value if self.value else 0.0


@dataclass
class MeasuredCosts:
    """Latency or memory of a model with given numbers of remaining units in each group.

    ``"latency"`` is in nanoseconds: the median time of nine forward passes of the whole model,
    times the median ratio of pairs in which the smaller and the whole model alternate, so that
    other load on the machine affects both. With one thread on a CPU
    (``torch.set_num_threads(1)``) the processor's time counts, and waiting for other processes does
    not. Repeated measurements of one model differ by a few percent, and so does the latency that is
    reached; measure on an idle machine, with the number of threads and the batch that the model
    will have.

    ``"memory"`` is in bytes and exact: parameters and buffers, and the inputs and outputs of the
    layer that has most of them, which is about what a forward pass without gradients holds.

    Args:
        kind: What is measured.
        model: The model, of which a copy is kept.
        groups: Its groups.
        example_inputs: What it is called with.
        forward_fn: How to call it otherwise.

    Cost: eighteen forward passes for each new combination of sizes that is asked for.
    """

    kind: MeasuredKind
    model: nn.Module
    groups: Sequence[UnitGroup]
    example_inputs: Any
    forward_fn: ForwardFunction | None = None
    _seen: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model)
        with at_rest(self.model):
            self._seconds()
            self._whole = median(self._seconds() for _ in range(_PAIRS))

    def total(self, resource: Resource, left: Units) -> float:
        """Return the cost of a model with these remaining units.

        Raises:
            ArgumentError: If the resource is another one.
        """
        check_choice("resource", resource, (self.kind,))
        key = self._key(left)
        if key not in self._seen:
            self._seen[key] = self._measured(key).value
        return self._seen[key]

    def anew(self, left: Units) -> Repeated:
        """Return the cost from a measurement of its own.

        The sizes that a search has settled on are those whose measurement happened to be low, so
        that the same measurement would flatter them.
        """
        return self._measured(self._key(left))

    def _key(self, left: Units) -> tuple[int, ...]:
        return tuple(left.get(group.name, group.units) for group in self.groups)

    def _measured(self, key: tuple[int, ...]) -> Repeated:
        kept = {
            group.name: torch.arange(count)
            for group, count in zip(self.groups, key, strict=True)
            if count < group.units
        }
        change = apply_plan(self.model, plan_of(self.model, self.groups, kept))
        try:
            return (
                self._latency(change) if self.kind == "latency" else Repeated(*3 * [self._bytes()])
            )
        finally:
            change.undo()

    def prices(self, left: Units) -> dict[str, float]:
        """Return the cost of one unit of each group, from halving the group alone.

        A price is at least a thousandth of an even share, because a difference may drown in noise.
        """
        whole = self.total(self.kind, left)
        least = _LEAST_PRICE * whole / max(sum(left.values()), 1)
        result = {}
        for name, units in left.items():
            half = max(units // 2, 1)
            if half == units:
                result[name] = least
                continue
            saved = whole - self.total(self.kind, {**left, name: half})
            result[name] = max(saved / (units - half), least)
        return result

    def _seconds(self) -> float:
        call = partial(run, self.model, self.example_inputs, self.forward_fn)
        return seconds_of(self.model, call)

    def _latency(self, change: Change) -> Repeated:
        ratios = []
        for _ in range(_PAIRS):
            with at_rest(self.model):
                small = self._seconds()
            change.undo()
            with at_rest(self.model):
                whole = self._seconds()
            change.redo()
            ratios.append(small / whole)
        return Repeated(*(1e9 * self._whole * each for each in _quartiles(ratios)))

    def _bytes(self) -> float:
        largest = 0

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal largest
            seen = [each for each in (*args, output) if isinstance(each, Tensor)]
            largest = max(largest, sum(each.nbytes for each in seen))

        with ExitStack() as stack, at_rest(self.model):
            for module in self.model.modules():
                if not any(True for _ in module.children()):
                    stack.callback(module.register_forward_hook(note).remove)
            run(self.model, self.example_inputs, self.forward_fn)
        held = [*self.model.parameters(), *self.model.buffers()]
        return float(sum(tensor.nbytes for tensor in held) + largest)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, low, high
