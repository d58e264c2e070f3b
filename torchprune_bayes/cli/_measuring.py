"""Measuring a model on any kind of data."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.calibration.batches import batch_size
from torchprune_bayes.calibration.functional import LossFunction
from torchprune_bayes.reports import EnergyMeter, ResultsTable, collect_sums, measure_energy

_MIB = 2**20


@contextmanager
def metered() -> Iterator[EnergyMeter]:
    """Measure energy if codecarbon is installed and a meter readable."""
    if find_spec("codecarbon") is None:
        yield EnergyMeter()
        return
    with measure_energy() as meter:
        yield meter


def largest_memory(device: torch.device) -> float | None:
    """Largest memory so far of a CUDA device, or of this process, in MiB; ``None`` if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    if device.type != "cpu" or find_spec("resource") is None:
        return None
    import resource

    unit = _MIB if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def energy_of(meter: EnergyMeter) -> dict[str, Any]:
    """An entry for the report, empty if nothing was measured."""
    return {} if meter.energy is None else {"energy_wh": asdict(meter.energy)}


def energy_lines(meter: EnergyMeter) -> list[str]:
    """A readable line, none if nothing was measured."""
    return (
        [] if meter.energy is None else [f"energy of pruning, of the whole machine: {meter.energy}"]
    )


@dataclass(frozen=True)
class Measured:
    """Results of a model on data.

    Attributes:
        metrics: By name; all of ``ClassificationMetrics``, or the mean loss and the samples.
        reliability: Confidence and accuracy bin by bin; ``None`` if there are no classes.
    """

    metrics: dict[str, float]
    reliability: ResultsTable | None = None


def loss_for(batches: Iterable[Any]) -> LossFunction | None:
    """The loss for the batches: the model's own for mappings, otherwise by target type."""
    return None if isinstance(next(iter(batches), None), Mapping) else supervised_loss


def supervised_loss(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy for integer targets, mean squared error for floating-point ones."""
    prediction = getattr(output, "logits", output)
    if target.is_floating_point():
        return mse_loss(prediction, target)
    return cross_entropy(prediction, target)


def measure(model: nn.Module, batches: Iterable[Any]) -> Measured | None:
    """Measure a model: classification metrics for one label per sample, otherwise the mean loss.

    Returns:
        The results, or ``None`` for data without labels.
    """
    labels = _labels(next(iter(batches), None))
    if labels is None:
        return None
    if labels.ndim == 1 and not labels.is_floating_point():
        sums = collect_sums(model, batches)
        return Measured(asdict(sums.compute()), sums.reliability())
    return Measured(_mean_loss(model, batches))


def metric_lines(before: Measured | None, after: Measured | None, data: str) -> list[str]:
    """Each metric before and after, and the data; nothing without labels."""
    if before is None or after is None:
        return []
    return [
        *(
            f"{name:>8}  {value:.4f} -> {after.metrics[name]:.4f}"
            for name, value in before.metrics.items()
            if name != "samples" and not (name == "top5" and value == after.metrics[name] == 1.0)
        ),
        f"measured on {data}, without fine-tuning",
    ]


def metrics_of(before: Measured | None, after: Measured | None, data: str) -> dict[str, Any] | None:
    """The results as plain values."""
    if before is None or after is None:
        return None
    return {"data": data, "before": before.metrics, "after": after.metrics}


def _labels(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return labels if isinstance(labels, Tensor) else None


def _mean_loss(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    everything = Calibration(model, batches, loss_for(batches))
    total, samples = 0.0, 0
    with torch.no_grad():
        for batch in everything.batches():
            total += float(everything.loss(None, batch)) * batch_size(batch)
            samples += batch_size(batch)
    return {"loss": total / samples, "samples": samples}
