"""Closing gates of a copy of a model, cutting them out for real, and measuring what is left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from torchprune_bayes.gates import fold_gates, gates_of
from torchprune_bayes.params import unwrap
from torchprune_bayes.reports.layout import Cell
from torchprune_bayes.reports.speed import compare_speed
from torchprune_bayes.structured import shrink

Measure: TypeAlias = Callable[[nn.Module], float]
Finetune: TypeAlias = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Trial:
    """What is done with a copy of a model with gates once some of them are closed.

    Attributes:
        model: The model, which stays as it is.
        measure: Gives the metric of a copy; ``None`` for none.
        finetune: Trains a copy for a little while before.
        example_inputs: What a copy is called with to be shrunk; ``None`` leaves the gates in it.
        pairs: Passes to time a copy with; zero for none.
    """

    model: nn.Module
    measure: Measure | None = None
    finetune: Finetune | None = None
    example_inputs: Any = None
    pairs: int = 0

    def run(self, chosen: Mapping[str, Tensor]) -> dict[str, Cell]:
        """Close these gates of a copy: fractions that are gone, the speed-up and the metric."""
        twin = copy.deepcopy(unwrap(self.model))
        gates = gates_of(twin)
        for name, gone in chosen.items():
            gates[name].close(gone)
        found: dict[str, Cell] = {"closed": gates.closed / gates.units}
        if self.example_inputs is not None:
            found |= self._shrink(twin)
        if self.finetune is not None:
            self.finetune(twin)
        if self.measure is not None:
            found["metric"] = float(self.measure(twin))
        return found

    def _shrink(self, twin: nn.Module) -> dict[str, Cell]:
        from torchprune_bayes.structured import BMRSImportance  # loads torch-pruning

        importance = BMRSImportance(gates_of(twin), criterion=None)  # what is closed, no more
        fold_gates(twin)
        report = shrink(twin, self.example_inputs, importance, target="evidence")
        assert report.flops is not None
        found: dict[str, Cell] = {
            "parameters": report.parameters.sparsity,
            "flops": report.flops.sparsity,
        }
        if self.pairs:
            whole = copy.deepcopy(unwrap(self.model))
            fold_gates(whole)
            speed = compare_speed(whole, twin, self.example_inputs, pairs=self.pairs)
            found["speedup"] = speed.speedup
        return found
