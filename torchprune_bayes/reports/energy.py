"""Energy of a block of code, read from the machine's own meters by codecarbon."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchprune_bayes._extras import optional

_ANY_COUNTRY = "USA"  # the tracker requires one; without `country` its emissions are not reported


@dataclass(frozen=True)
class Energy:
    """Energy used by the whole machine, in watt-hours.

    Attributes:
        cpu: By the processors; ``None`` where they have no readable meter.
        gpu: By the GPUs; ``None`` where there are none.
        emissions: Grams of CO₂ equivalent of both; ``None`` if no country was given.
    """

    cpu: float | None
    gpu: float | None
    emissions: float | None = None

    def __str__(self) -> str:
        parts = {"CPU": self.cpu, "GPU": self.gpu}
        shown = [f"{name} {value:.3g} Wh" for name, value in parts.items() if value is not None]
        if self.emissions is not None:
            shown.append(f"{self.emissions:.3g} g CO2e")
        return ", ".join(shown)


@dataclass
class EnergyMeter:
    """Result of :func:`measure_energy`.

    Attributes:
        energy: Energy used by the ``with`` block, set after it; ``None`` where no meter is
            readable.
    """

    energy: Energy | None = None


@contextmanager
def measure_energy(country: str | None = None) -> Iterator[EnergyMeter]:
    """Measure the energy of the ``with`` block, where the machine has meters that can be read.

    Counted are processors (RAPL, Intel Power Gadget) and GPUs (NVML) of the whole machine, other
    processes included. Without a readable meter nothing is estimated: ``energy`` stays ``None``.

    Args:
        country: ISO code of three letters, such as ``"DNK"``, whose electricity mix converts energy
            to emissions.

    Yields:
        A meter, whose ``energy`` is set after the block.

    Raises:
        MissingExtraError: If codecarbon is not installed.

    Cost: up to a second to begin, and a thread that reads the meters every few seconds.

    Example:
        >>> with measure_energy() as meter:
        ...     total = sum(range(1000))
        >>> meter.energy is None or meter.energy.cpu is not None or meter.energy.gpu is not None
        True
    """
    meter, readable = EnergyMeter(), readable_meters()
    if not readable:
        yield meter
        return
    tracker = _tracker(country)
    tracker.start()
    try:
        yield meter
    finally:
        tracker.stop()
    data = getattr(tracker, "final_emissions_data", None)
    if data is None:  # the tracker swallows its own errors
        return
    cpu = 1e3 * data.cpu_energy if "cpu" in readable else None
    gpu = 1e3 * data.gpu_energy if "gpu" in readable else None
    meter.energy = Energy(cpu, gpu, _emissions(data, (cpu or 0.0) + (gpu or 0.0), country))


def readable_meters() -> set[str]:
    """Which of ``"cpu"`` and ``"gpu"`` have a meter that this process may read.

    Raises:
        MissingExtraError: If codecarbon is not installed.
    """
    with optional("codecarbon", "energy"):
        from codecarbon.core import cpu, gpu
    readable_by_kind = {"cpu": cpu.is_rapl_available() or cpu.is_powergadget_available()}
    readable_by_kind["gpu"] = gpu.is_gpu_details_available()
    return {name for name, readable in readable_by_kind.items() if readable}


def _tracker(country: str | None) -> Any:
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # before it reads `log_level`
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # `save_to_file`, from 3.3 on
        return OfflineEmissionsTracker(
            country_iso_code=country or _ANY_COUNTRY,
            save_to_file=False,
            log_level="critical",
            allow_multiple_runs=True,
        )


def _emissions(data: Any, watt_hours: float, country: str | None) -> float | None:
    """Grams, scaled by the meters' share of all that codecarbon counts, such as estimated RAM."""
    if country is None or not data.energy_consumed:
        return None
    return float(1e3 * data.emissions * (watt_hours / 1e3) / data.energy_consumed)
