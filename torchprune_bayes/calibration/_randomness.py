"""Random numbers of a calibration's own, so that the caller's generators are left alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch


class IsolatedRandomness:
    """A private state of the random generators, entered and left any number of times.

    Inside, torch's (CPU and, for a CUDA device, that device's), Python's and NumPy's generators
    continue where they were left the last time; outside they are as the caller left them. So data
    can be drawn lazily, batch by batch, without the caller's code seeing a changed generator.

    Args:
        seed: Seed of all private states.
        device: The device whose generator is isolated beside the CPU's.
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
        self._device = device if device is not None and device.type == "cuda" else None
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
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        for generator in self._generators:
            generator.manual_seed(seed)

    def _capture(self) -> dict[str, Any]:
        states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate()}
        if self._device is not None:
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        if "numpy" in sys.modules:
            states["numpy"] = sys.modules["numpy"].random.get_state()
        states["own"] = [generator.get_state() for generator in self._generators]
        return states

    def _restore(self, states: dict[str, Any]) -> None:
        torch.set_rng_state(states["cpu"])
        random.setstate(states["python"])
        if self._device is not None:
            torch.cuda.set_rng_state(states["cuda"], self._device)
        if "numpy" in states:
            sys.modules["numpy"].random.set_state(states["numpy"])
        for generator, state in zip(self._generators, states["own"], strict=True):
            generator.set_state(state)
