"""One forward pass that re-fits every layer that reads removed units when it is reached."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.calibration import Batch, Calibration, batch_size
from torchprune_bayes.calibration.batches import cut, joined
from torchprune_bayes.structured._reader import Reader, Statistics, matched
from torchprune_bayes.structured._readers import (
    Rows,
    Tensors,
    first_samples,
    first_tensor,
    in_pieces,
    installed,
    survey,
    without_rows,
)
from torchprune_bayes.structured.slicing import first_names

logger = logging.getLogger("torchprune_bayes")

_LIVE_ACTIVATIONS = 4  # of the largest layer, inputs and outputs, in a pass without gradients
_LEAST_SAMPLES, MOST_SAMPLES = 256, 4096


@dataclass(frozen=True)
class LayerRepair:
    """How well a layer's outputs are approximated without the removed units.

    Attributes:
        name: The layer.
        cut_error: Mean squared change of its outputs when the units are removed, summed over the
            outputs, with their mean contribution in the bias where there is one.
        error: The same after the fit.
        damping: The ridge that was used, see :func:`repair`.
    """

    name: str
    cut_error: float
    error: float
    damping: float


@dataclass
class _Norm:
    """A batch norm behind repaired layers."""

    path: str
    module: Any
    before: Statistics | None = None
    parts: list[Tensor] = field(default_factory=list)

    def observe(self, inputs: Tensor, samples: int) -> None:
        """Add inputs to the statistics."""
        rows = wide(inputs.transpose(0, 1).flatten(1))
        count = torch.full_like(rows[:, 0], rows.shape[1])
        self.parts.append(torch.stack([count, rows.sum(1), rows.square().sum(1)]))

    def statistics(self) -> Statistics:
        """Statistics of all inputs since the last call."""
        count, total, squares = torch.stack(self.parts).sum(0)
        self.parts.clear()
        mean = total / count
        return Statistics(mean, (squares / count - mean.square()).clamp_min(0.0))


class _ReachedError(Exception):
    """Ends a forward pass at the awaited layer."""


def _noting(norm: _Norm) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = first_tensor(args, kwargs)
        if inputs is not None:
            norm.observe(inputs, 0)

    return note


class Walk:
    """Forward passes that re-fit one layer after the other, in the order of their calls.

    With a single batch this is one pass: a layer is re-fit when the pass reaches it, and the pass
    continues with its new weights. With several batches each layer takes a pass over all of them
    that ends there, because its fit needs them all. Removed dimensions of queries and keys, which
    are read by no layer, are zero from the start; ``tensors`` holds their compensation.
    """

    def __init__(
        self,
        calibration: Calibration,
        readers: Mapping[str, Reader],
        keeps: Mapping[str, Tensor],
        damping: float | str,
        tensors: Tensors,
        rows: Mapping[nn.Module, Rows],
    ) -> None:
        self._calibration, self._damping, self._keeps = calibration, damping, keeps
        norms = [
            _Norm(path, module)
            for path, module in calibration.model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        self._sites: list[Reader | _Norm] = [*readers.values(), *norms]
        self._rows = rows
        self._tensors: Tensors = {site.module: {} for site in self._sites}
        self._tensors |= tensors
        self._names = {module: path for path, module in calibration.model.named_modules()}
        self._open = {site.module for site in self._sites}
        self._current: Reader | _Norm | None = None
        self._samples, self._whole = 0, False
        self.fits: list[LayerRepair] = []

    def run(self) -> None:
        """Re-fit all layers that are called."""
        batches = self._batches()
        self._whole = len(batches) == 1
        self._take_reference(batches)
        with ExitStack() as stack:
            for site in self._sites:
                hook = self._arrival(site)
                handle = site.module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(installed(self._tensors))  # after the hooks that settle
            while True:
                self._current = None
                for batch in batches:
                    self._pass(batch)
                if self._current is None:
                    return
                self._settle(self._current)

    def values(self) -> dict[str, Tensor]:
        """All new tensors by first qualified name."""
        first, _ = first_names(self._calibration.model)
        return {
            first[f"{self._names[module]}.{key}".lstrip(".")]: tensor
            for module, tensors in self._tensors.items()
            for key, tensor in tensors.items()
        }

    def _take_reference(self, batches: Sequence[Batch]) -> None:
        """Record the inputs of each batch norm before any change."""
        norms = [site for site in self._sites if isinstance(site, _Norm)]
        if not norms:
            return
        with ExitStack() as stack:
            for norm in norms:
                handle = norm.module.register_forward_pre_hook(_noting(norm), with_kwargs=True)
                stack.callback(handle.remove)
            for batch in batches:
                self._pass(batch)
        for norm in norms:
            if norm.parts:
                norm.before = norm.statistics()

    def _pass(self, batch: Batch) -> None:
        try:
            with torch.no_grad():
                self._calibration.loss(None, batch)
        except _ReachedError:
            pass

    def _arrival(self, site: Reader | _Norm) -> Any:
        def arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = first_tensor(args, kwargs)
            if module not in self._open or inputs is None:
                return
            if isinstance(site, _Norm) and not self.fits:  # nothing in front of it has changed
                self._open.discard(module)
            elif self._current in (None, site):
                self._meet(site, inputs)

        return arrive

    def _meet(self, site: Reader | _Norm, inputs: Tensor) -> None:
        site.observe(inputs, self._samples)
        if self._whole:
            self._settle(site)
        else:
            self._current = site
            raise _ReachedError

    def _settle(self, site: Reader | _Norm) -> None:
        self._open.discard(site.module)
        if isinstance(site, _Norm):
            if site.before is not None:
                self._tensors[site.module] = matched(site.module, site.before, site.statistics())
            return
        fit, fitted = site.fit(self._keeps[site.name], self._damping)
        self._tensors[site.module] = without_rows(
            site.module, self._rows.get(site.module, []), fitted
        )
        self.fits.append(LayerRepair(site.path, fit.cut_error, fit.error, fit.damping))
        site.rows = None

    def _batches(self) -> list[Batch]:
        """As many samples as fit into memory at once, as one batch; with a minimum number."""
        pieces = list(first_samples(self._calibration, MOST_SAMPLES))
        readers = [site for site in self._sites if isinstance(site, Reader)]
        largest = survey(self._calibration, cut(pieces[0], 0, 1), readers)
        room = self._calibration.memory.gradients_bytes
        fitting = max(1, int(room // (_LIVE_ACTIVATIONS * largest)))
        whole = joined(pieces)
        if fitting < min(_LEAST_SAMPLES, sum(map(batch_size, pieces))):
            logger.info(
                "The repair takes a pass for each layer, because %d samples at once need more "
                "memory: memory_mb=%d in the calibration makes it one pass.",
                _LEAST_SAMPLES,
                math.ceil(2 * _LEAST_SAMPLES * _LIVE_ACTIVATIONS * largest / 2**20),
            )
        if whole is not None:
            pieces = [cut(whole, 0, max(fitting, _LEAST_SAMPLES))]
        batches = in_pieces(pieces, fitting)
        self._samples = sum(batch_size(batch) for batch in batches)
        return batches
