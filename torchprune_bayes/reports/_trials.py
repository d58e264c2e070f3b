"""Closing gates of a copy of a model, removing them, and measuring the result."""

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
    """Processing of a copy of a model with gates after some of them are closed.

    Attributes:
        model: The model; it is not changed.
        measure: Returns the metric of a copy; ``None`` for none.
        finetune: Trains a copy briefly before it is measured.
        example_inputs: Inputs to shrink a copy with; ``None`` leaves the gates in it.
        pairs: Timed passes of a copy; 0 does not time.
    """

    model: nn.Module
    measure: Measure | None = None
    finetune: Finetune | None = None
    example_inputs: Any = None
    pairs: int = 0

    def run(self, chosen: Mapping[str, Tensor]) -> dict[str, Cell]:
        """Close these gates of a copy: removed fractions, the speed-up and the metric."""
        twin = copy.deepcopy(unwrap(self.model))
        gates = gates_of(twin)
        for name, closing in chosen.items():
            gates[name].close(closing)
        results: dict[str, Cell] = {"closed": gates.closed / gates.units}
        if self.example_inputs is not None:
            results |= self._shrink(twin)
        if self.finetune is not None:
            self.finetune(twin)
        if self.measure is not None:
            results["metric"] = float(self.measure(twin))
        return results

    def _shrink(self, twin: nn.Module) -> dict[str, Cell]:
        from torchprune_bayes.structured import BMRSImportance  # loads torch-pruning

        importance = BMRSImportance(gates_of(twin), criterion=None)  # exactly the closed gates
        fold_gates(twin)
        report = shrink(twin, self.example_inputs, importance, target="evidence")
        assert report.flops is not None
        results: dict[str, Cell] = {
            "parameters": report.parameters.sparsity,
            "flops": report.flops.sparsity,
        }
        if self.pairs:
            whole = copy.deepcopy(unwrap(self.model))
            fold_gates(whole)
            speed = compare_speed(whole, twin, self.example_inputs, pairs=self.pairs)
            results["speedup"] = speed.speedup
        return results
