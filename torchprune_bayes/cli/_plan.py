"""What pruning will take, estimated before it begins."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from time import perf_counter

from torchprune_bayes.calibration import Calibration

_MIB = 2**20
_ROWS_TO_TIME = 8


@dataclass(frozen=True)
class Plan:
    """What the gradients of one step take, and what keeping them takes.

    Attributes:
        samples: Calibration samples.
        gradients: Gradients taken from them, one per sample or per mini-batch.
        weights: Live prunable weights, the length of a gradient.
        gradient_mb: All gradients together, in MiB.
        peak_mb: About what the methods that need most hold in memory beside the model, in MiB.
        disk_mb: What a scratch file takes, in MiB; 0 where the gradients are kept in memory.
        gradient_seconds: Estimated time of one pass, extrapolated from a few gradients.
        engine: How gradients are computed, as ``Calibration.engine``.
    """

    samples: int
    gradients: int
    weights: int
    gradient_mb: float
    peak_mb: float
    disk_mb: float
    gradient_seconds: float
    engine: str


def estimate(calibration: Calibration) -> Plan:
    """Estimate what gradients of a calibration take, by timing a few of them.

    Gradients are taken once per step. Up to half of the calibration's memory budget they are kept
    in memory, otherwise in a scratch file. The peak is that of the OBS methods, with a dozen
    float64 vectors of the weights and a few Gram matrices; others need less.

    Args:
        calibration: Model and data; not changed.

    Cost: the first few gradients, twice; a count of the data if ``num_samples`` was not given.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration
        >>> data = [(torch.randn(100, 64), torch.randint(2, (100,)))]
        >>> model = torch.nn.Linear(64, 2)
        >>> plan = estimate(Calibration(model, data, torch.nn.functional.cross_entropy))
        >>> plan.gradients, plan.weights, round(plan.gradient_mb, 3), plan.disk_mb
        (100, 128, 0.049, 0.0)
    """
    weights = sum(int(mask.sum()) for mask in calibration.space.masks().values())
    count, item = calibration.num_gradients, calibration.dtype.itemsize
    size = float(count * weights * item)
    in_memory = size <= calibration.memory.gradients_bytes and calibration.offload == "auto"
    in_memory = in_memory or calibration.offload in ("device", "host")
    block = min(2 * size, calibration.memory.block_bytes)
    work = block + 4 * 8 * count**2 + 12 * 8 * weights
    return Plan(
        samples=calibration.num_samples,
        gradients=count,
        weights=weights,
        gradient_mb=size / _MIB,
        peak_mb=(work + size * in_memory) / _MIB,
        disk_mb=0.0 if in_memory else size / _MIB,
        gradient_seconds=count * _seconds_per_gradient(calibration),
        engine=str(calibration.engine),
    )


def in_words(seconds: float) -> str:
    """A duration to two digits: ``0.3 s``, ``45 s``, ``12 min``, ``3.5 h``.

    Example:
        >>> [in_words(seconds) for seconds in (0.031, 45.2, 700, 12600)]
        ['0.031 s', '45 s', '12 min', '3.5 h']
    """
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"


def in_mib(size: float) -> str:
    """A size in MiB to two digits or in whole ones: ``3.7 MiB``, ``1,024 MiB``."""
    return f"{size:.2g} MiB" if size < 10 else f"{size:,.0f} MiB"


def _seconds_per_gradient(calibration: Calibration) -> float:
    # The first pass also probes the engine and warms up kernels: it is not timed.
    with closing(iter(calibration.gradients())) as warming:  # type: ignore[type-var]
        next(warming)
    begin, rows = perf_counter(), 0
    with closing(iter(calibration.gradients())) as stream:  # type: ignore[type-var]
        for part in stream:
            rows += len(part)
            if rows >= _ROWS_TO_TIME:
                break
    return (perf_counter() - begin) / rows
