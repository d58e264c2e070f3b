"""What pruning will take, estimated before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from torchprune_bayes.calibration import Calibration, GradientCost
from torchprune_bayes.cli._measuring import largest_memory

_MIB = 2**20
_ROWS_TO_TIME = 8
_WHOLE_CALL = 2, 8  # times the gradients, see docs/results/engine.md
_LARGE = 2_000_000  # weights of the networks for which this holds
_WORKSPACE = 40 * _MIB  # of linear algebra


@dataclass(frozen=True)
class Plan:
    """What the gradients of one step take, and what keeping them takes.

    Attributes:
        samples: Calibration samples.
        gradients: Gradients taken from them, one per sample or per mini-batch.
        steps: Passes over the samples, one for each step of the method.
        weights: Remaining prunable weights, the length of a gradient.
        gradient_mb: All gradients together, in MiB.
        peak_mb: About what the methods that need most hold in memory beside the model, in MiB, with
            the gradients where these are kept there.
        disk_mb: What a scratch file takes, in MiB; 0 where the gradients are kept in memory.
        gradient_seconds: Estimated time of one pass, extrapolated from a few gradients.
        engine: How gradients are computed, as ``Calibration.engine``.
        keeps_gradients: Whether the method keeps single gradients, to invert their Fisher, and not
            sums over them alone.
    """

    samples: int
    gradients: int
    steps: int
    weights: int
    gradient_mb: float
    peak_mb: float
    disk_mb: float
    gradient_seconds: float
    engine: str
    keeps_gradients: bool = True

    def lines(self) -> list[str]:
        """The plan in words."""
        steps = f" in each of {self.steps} steps" if self.steps > 1 else ""
        first = f"plan: {self.samples:,} samples"
        seconds = in_words(self.gradient_seconds * self.steps)
        if not self.keeps_gradients:
            return [
                f"{first}, sums over their gradients{steps}; a pass takes about "
                f"{in_words(self.gradient_seconds)}, estimated from a few"
            ]
        place = f"a scratch file of {in_mib(self.disk_mb)}" if self.disk_mb else "memory"
        whole = "solving comes on top"
        if self.weights >= _LARGE:
            low, high = _WHOLE_CALL
            whole += f", {low} to {high} times as long in all on the networks that were measured"
        return [
            f"{first}, {self.gradients:,} gradients, one pass over the data{steps}; {self.engine}",
            f"      gradients of {in_mib(self.gradient_mb)}, kept in {place}; at the peak up to "
            f"about {in_mib(self.peak_mb)} of memory beside the model",
            f"      about {seconds} for gradients, estimated from a few of them; {whole}",
        ]

    def comparison(self, taken: Taken) -> str:
        """What happened, with the plan in brackets."""
        parts = [f"took {in_words(taken.seconds)} in all"]
        if self.keeps_gradients:
            planned = self.gradient_seconds * self.steps
            parts.append(
                f"{taken.gradients:,} gradients (planned {self.gradients * self.steps:,}) in "
                f"{in_words(taken.gradient_seconds)} (planned {in_words(planned)})"
            )
        if taken.memory_mb is not None:
            up_to = f" (planned up to {in_mib(self.peak_mb)})" if self.keeps_gradients else ""
            parts.append(f"memory grew by {in_mib(taken.memory_mb)}{up_to}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Taken:
    """What pruning took, to compare with the plan.

    Attributes:
        gradients: Gradients computed, in all steps.
        gradient_seconds: Time for these.
        seconds: Time of the whole call.
        memory_mb: Growth of the largest memory of the process, or of the accelerator, in MiB;
            ``None`` where it cannot be read.
    """

    gradients: int
    gradient_seconds: float
    seconds: float
    memory_mb: float | None


@dataclass
class Watch:
    """Holds what a call took, once it has ended."""

    taken: Taken


@contextmanager
def watched(calibration: Calibration | None, device: torch.device) -> Iterator[Watch]:
    """Measure what the calls inside take.

    What the process held before and gave back, as while it loaded a model, is used again first and
    does not count as growth.

    Args:
        calibration: Where gradients come from, if there are any.
        device: Whose memory to look at.
    """
    watch = Watch(Taken(0, 0.0, 0.0, None))
    begin, memory = perf_counter(), largest_memory(device)
    before = GradientCost() if calibration is None else replace(calibration.cost)
    yield watch
    after = before if calibration is None else calibration.cost
    now = largest_memory(device)
    watch.taken = Taken(
        after.gradients - before.gradients,
        after.seconds - before.seconds,
        perf_counter() - begin,
        None if memory is None or now is None else now - memory,
    )


def estimate(calibration: Calibration, steps: int = 1, *, keeps_gradients: bool = True) -> Plan:
    """Estimate what gradients of a calibration take, by timing a few of them.

    Gradients are taken once per step. Up to half of the calibration's memory budget they are kept
    in memory, otherwise in a scratch file. The peak is that of the OBS methods, with a dozen
    float64 vectors of the weights and a few Gram matrices; others need less.

    Args:
        calibration: Model and data; not changed.
        steps: Steps of the method.
        keeps_gradients: Whether it keeps single gradients.

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
    work = block + 4 * 8 * count**2 + 12 * 8 * weights + _WORKSPACE
    return Plan(
        samples=calibration.num_samples,
        gradients=count,
        steps=steps,
        weights=weights,
        gradient_mb=size / _MIB,
        peak_mb=(work + size * in_memory) / _MIB,
        disk_mb=0.0 if in_memory else size / _MIB,
        gradient_seconds=count * _seconds_per_gradient(calibration),
        engine=str(calibration.engine),
        keeps_gradients=keeps_gradients,
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
