"""The comparison on digits: train, prune copies by every method, measure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.cli._options import options_of
from torchprune_bayes.cli.digits import CalibrationDigits, load_digits
from torchprune_bayes.methods import find_method, prune_global, registered_methods
from torchprune_bayes.params import prunable_parameters
from torchprune_bayes.reports import evaluate

STRONGEST, STEPS = "woodtaylor", 8
"""The method that is run in several steps too, and in how many."""

LIMITS = {"probes": 32, "perturbations": 10, "steps": 20, "max_iterations": 20}
"""Largest values of options, to keep the comparison short; defaults beyond them are cut."""

DENSE = "dense"
"""What the network is called before pruning."""


@dataclass(frozen=True)
class Variant:
    """A method with options, and its name in the table."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    is_limited: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether the method uses gradients."""
        return find_method(self.method).needs_calibration

    @property
    def shown_options(self) -> str:
        """The options as they are typed after ``--option``."""
        return " ".join(f"{key}={value}" for key, value in self.options.items())


def variants(names: Sequence[str] | None, steps: int | None) -> list[Variant]:
    """The rows to compare: each method in one step, and some in several.

    Args:
        names: Registered methods; ``None`` for all that prune single weights.
        steps: Steps for every method that takes ``steps``; ``None`` for the
            methods' own, and 8 for the strongest.

    Raises:
        ArgumentError: If a method does not exist.

    Example:
        >>> [variant.label for variant in variants(["magnitude", "woodtaylor"], None)]
        ['magnitude', 'woodtaylor', 'woodtaylor, 8 steps']
    """
    chosen = []
    everything = [key for key, entry in registered_methods().items() if not entry.is_structured]
    for name in everything if names is None else dict.fromkeys(names):
        accepted = options_of(find_method(name).method)
        options = {key: limit for key, limit in LIMITS.items() if _exceeds(accepted, key, limit)}
        chosen.append(Variant(name, name, options, bool(options)))
        several = (STEPS if name == STRONGEST else 1) if steps is None else steps
        if "steps" in accepted and several > 1:
            stepwise = options | {"steps": several}
            limited = bool(options.keys() - {"steps"})
            chosen.append(Variant(f"{name}, {several} steps", name, stepwise, limited))
    return chosen


def _exceeds(accepted: dict[str, Any], key: str, limit: int) -> bool:
    return key in accepted and (accepted[key] is None or accepted[key] > limit)


@dataclass(frozen=True)
class Trial:
    """A trained network, and settings for pruning copies of it."""

    model: nn.Module
    seed: int
    num_samples: int

    def dense(self) -> dict[str, Any]:
        """The row of the dense network."""
        return self._row(DENSE, 0.0) | measured(self.model)

    def pruned(self, variant: Variant, sparsity: float) -> dict[str, Any]:
        """The row of a pruned copy; a method that fails leaves its error in the row."""
        row = self._row(variant.label, sparsity) | {"options": variant.shown_options}
        model = copy.deepcopy(self.model)
        options = {"amount": sparsity, **variant.options}
        torch.manual_seed(self.seed)  # PyTorch's random method draws from it
        try:
            if variant.needs_calibration:
                options["calibration"] = self.calibration(model)
            begin = perf_counter()
            prune_global(prunable_parameters(model), variant.method, **options)
            seconds = perf_counter() - begin
            return row | measured(model) | {"seconds": seconds}
        except Exception as error:  # one method must not lose the others' results
            reason = " ".join(str(error).split())
            return row | {"error": f"{type(error).__name__}: {reason}"}

    def calibration(self, model: nn.Module) -> Calibration:
        """The digits as calibration data for the network or a copy of it."""
        data = CalibrationDigits(load_digits(), self.num_samples)
        return Calibration(model, data, cross_entropy, num_samples=self.num_samples, seed=self.seed)

    def _row(self, label: str, sparsity: float) -> dict[str, Any]:
        return {
            "method": label,
            "sparsity": sparsity,
            "seed": self.seed,
            "num_samples": self.num_samples,
        }


def measured(model: nn.Module) -> dict[str, Any]:
    """Metrics on the test images, as columns."""
    metrics = asdict(evaluate(model, load_digits().test.batches()))
    return {f"test_{name}" if name == "samples" else name: v for name, v in metrics.items()}
