"""Private random states of a calibration, so that the caller's generators do not change."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class DeviceGenerator:
    """The default generator of one device other than the CPU, for any backend.

    Args:
        module: The backend, ``torch.cuda`` for one.
        device: The device.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        # Backends with one device, such as torch.mps, take no device.
        self._device = (device,) if hasattr(module, "device") else ()

    def seed(self, seed: int) -> None:
        """Seed it."""
        with self._module.device(*self._device) if self._device else nullcontext():
            self._module.manual_seed(seed)

    def state(self) -> Tensor:
        """A copy of its state."""
        state: Tensor = self._module.get_rng_state(*self._device)
        return state

    def restore(self, state: Tensor) -> None:
        """Restore a state."""
        self._module.set_rng_state(state, *self._device)


def _device_generator(device: torch.device) -> DeviceGenerator | None:
    """The generator of a device; ``None`` for the CPU and devices without one (``meta``)."""
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return DeviceGenerator(module, device) if hasattr(module, "get_rng_state") else None


class IsolatedRandomness:
    """A private state of the random generators, entered and left any number of times.

    Inside, torch's (the CPU's and that of another device), Python's and NumPy's generators
    continue where they stopped last time; outside they are the caller's. So data
    can be drawn lazily, batch by batch, without the caller's code seeing a changed generator.

    Args:
        seed: Seed of all private states.
        device: The device whose generator is isolated in addition to the CPU's.
        generators: Further generators, such as a data loader's own.

    Example:
        >>> randomness = IsolatedRandomness(0)
        >>> before = torch.get_rng_state()
        >>> with randomness:
        ...     first = torch.rand(1)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """

    def __init__(
        self,
        seed: int,
        device: torch.device | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._device = None if device is None else _device_generator(device)
        self._generators = generators
        outer = self._capture()
        try:
            self._seed(seed)
            self._inner = self._capture()
        finally:
            self._restore(outer)

    def __enter__(self) -> IsolatedRandomness:
        self._outer = self._capture()
        self._restore(self._inner)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inner = self._capture()
        self._restore(self._outer)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._device is not None:
            self._device.seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        for generator in self._generators:
            generator.manual_seed(seed)

    def _capture(self) -> dict[str, Any]:
        states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
        if self._device is not None:
            states["device"] = self._device.state()
        if "numpy" in sys.modules:
            states["numpy"] = sys.modules["numpy"].random.get_state()
        states["own"] = [generator.get_state() for generator in self._generators]
        return states

    def _restore(self, states: dict[str, Any]) -> None:
        torch.set_rng_state(states["cpu"])
        random.setstate(states["python"])
        if self._device is not None:
            self._device.restore(states["device"])
        if "numpy" in states:
            sys.modules["numpy"].random.set_state(states["numpy"])
        for generator, state in zip(self._generators, states["own"], strict=True):
            generator.set_state(state)
