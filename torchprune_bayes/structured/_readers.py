"""Layers that read units: recording their inputs, fitting them, and trying other tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchprune_bayes._numerics.input_moments import Fit, Moments, least_squares
from torchprune_bayes._numerics.precision import float64_device, wide
from torchprune_bayes.calibration import Batch, Calibration, batch_size
from torchprune_bayes.calibration.batches import cut
from torchprune_bayes.structured._layer_inputs import (
    as_matrix,
    as_weight,
    is_readable,
    rows_of,
    taps_of,
)
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.slicing import first_names

Tensors: TypeAlias = dict[nn.Module, dict[str, Tensor]]
"""Parameters and buffers by local name, for some modules."""

Rows: TypeAlias = list[tuple[str, int, Tensor]]
"""Local name of a parameter, a dimension of it, and indices along it."""

_ROWS_PER_ENTRY, _LEAST_ROWS = 32, 16384


class Statistics(NamedTuple):
    """Mean and variance of each channel, float64."""

    mean: Tensor
    variance: Tensor


def matched(norm: Any, before: Statistics, now: Statistics) -> dict[str, Tensor]:
    """Return running statistics with which a batch norm's outputs keep their mean and variance.

    Where the norm's statistics are those of its inputs, as in a trained network, this is
    recomputing them. Where they are not (before training, or on other data) it changes nothing that
    the inputs did not.

    Args:
        norm: The batch norm.
        before: Statistics of its inputs that correspond to its running statistics.
        now: Statistics of its inputs now.
    """
    mean, variance = (wide(norm._buffers[key]) for key in ("running_mean", "running_var"))
    ratio = (now.variance + norm.eps) / (before.variance + norm.eps)
    moved = now.mean + (mean - before.mean) * ratio.sqrt()
    scaled = ((variance + norm.eps) * ratio - norm.eps).clamp_min(0.0)
    return {
        "running_mean": moved.to(norm._buffers["running_mean"]),
        "running_var": scaled.to(norm._buffers["running_var"]),
    }


@dataclass
class Reader:
    """A layer that reads units.

    Attributes:
        name: First qualified name of its weight.
        path: Qualified name of the layer.
        module: The layer.
        dim: Dimension of the weight along its inputs.
        norm: The batch norm that directly reads its output, if there is one.
        halves: Moments of two halves of its inputs, once they were recorded.
    """

    name: str
    path: str
    module: nn.Module
    dim: int
    norm: nn.Module | None = None
    halves: tuple[Moments, Moments] | None = None

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._seen = 0

    @property
    def weight(self) -> Tensor:
        """The weight as it is in the forward pass."""
        weight: Any = self.module._parameters["weight"]
        return torch.Tensor.detach(weight)

    @property
    def moment_bytes(self) -> int:
        """Memory that the moments of its inputs take."""
        size = self.weight.shape[self.dim] * taps_of(self.module)
        halves, float64 = 2, 8
        return halves * float64 * size * (size + 1)

    def observe(self, inputs: Tensor, samples: int) -> None:
        """Add inputs to the moments, alternate samples for either half.

        Args:
            inputs: Inputs of the layer.
            samples: Total number of samples; many rows of few samples are subsampled.
        """
        size = self.weight.shape[self.dim] * taps_of(self.module)
        if self.halves is None:
            self.halves = Moments.zeros(size, inputs.device), Moments.zeros(size, inputs.device)
        per_sample = -(-max(_ROWS_PER_ENTRY * size, _LEAST_ROWS) // samples)
        for half, moments in enumerate(self.halves):
            part = inputs[(half + self._seen) % 2 :: 2]
            if part.numel():
                for rows in rows_of(self.module, part, per_sample, self._generator):
                    moments.add(rows)
        self._seen += len(inputs)

    def fit(self, keep: Tensor, damping: float | str) -> tuple[Fit, dict[str, Tensor]]:
        """Fit the layer on some of its inputs.

        Args:
            keep: Boolean, one for each input channel or feature.
            damping: See :func:`~torchprune_bayes._numerics.input_moments.least_squares`.

        Returns:
            The fit, and the new weight and bias by local name.
        """
        assert self.halves is not None
        weight, bias = self.weight, self.module._parameters.get("bias")
        fit = least_squares(
            as_matrix(self.module, weight),
            keep.repeat_interleave(taps_of(self.module)).to(float64_device(weight.device)),
            self.halves,
            intercept=bias is not None or self.norm is not None,
            damping=damping,
        )
        result = {"weight": as_weight(self.module, fit.weight, weight)}
        if bias is not None:
            result["bias"] = (wide(bias.detach()) + fit.shift).to(bias)
        return fit, result

    def output_statistics(self, tensors: Mapping[str, Tensor]) -> Statistics:
        """Mean and variance of the layer's outputs with a weight and bias, from its inputs'."""
        assert self.halves is not None
        whole = self.halves[0] + self.halves[1]
        matrix = wide(as_matrix(self.module, tensors["weight"]))
        bias = tensors.get("bias", self.module._parameters.get("bias"))
        mean = matrix @ whole.mean() + (0.0 if bias is None else wide(bias.detach()))
        return Statistics(mean, ((matrix @ whole.second(centred=True)) * matrix).sum(1))


def readers_of(
    model: nn.Module, groups: Sequence[UnitGroup]
) -> tuple[dict[str, Reader], list[str]]:
    """Return the layers that read units, by the first name of their weight, and all others."""
    first, _ = first_names(model)
    result: dict[str, Reader] = {}
    unsupported: list[str] = []
    for group in groups:
        for piece in group.slices:
            if piece.role != "consumer":
                continue
            path, _, local = piece.name.rpartition(".")
            module = model.get_submodule(path)
            if local == "weight" and is_readable(module):
                name = first[piece.name]
                result.setdefault(name, Reader(name, path, module, piece.dim))
            else:
                unsupported.append(path)
    return result, list(dict.fromkeys(unsupported))


def rows_that_go(
    model: nn.Module, groups: Sequence[UnitGroup], gone: Mapping[str, Tensor]
) -> dict[nn.Module, Rows]:
    """Removed dimensions of queries and keys, which no layer reads, by producing layer.

    Args:
        model: The model.
        groups: Its groups.
        gone: Units that go, by the name of their group.
    """
    result: dict[nn.Module, Rows] = {}
    for group in groups:
        for piece in group.unread if group.name in gone else ():
            path, _, key = piece.name.rpartition(".")
            rows = piece.positions[gone[group.name].to(piece.positions.device)].flatten()
            result.setdefault(model.get_submodule(path), []).append((key, piece.dim, rows))
    return result


def without_rows(module: nn.Module, rows: Rows, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's own tensors, or others in their place, with zeros in some rows."""
    result = dict(tensors)
    for key, dim, indices in rows:
        tensor = result.get(key, module._parameters[key])
        assert tensor is not None
        result[key] = tensor.detach().index_fill(dim, indices.to(tensor.device), 0.0)
    return result


@contextmanager
def installed(tensors: Tensors) -> Iterator[None]:
    """Make modules use other parameters and buffers whenever a calibration calls them.

    A calibration runs its model on its own values, which it removes after each pass; so what
    is installed when a module is called remains until the pass ends. ``tensors`` may grow
    meanwhile.
    """

    def install(module: nn.Module, args: tuple[Any, ...]) -> None:
        for key, tensor in tensors.get(module, {}).items():
            table: dict[str, Any] = (
                module._parameters if key in module._parameters else module._buffers
            )
            table[key] = tensor

    with ExitStack() as stack:
        for module in tensors:
            stack.callback(module.register_forward_pre_hook(install).remove)
        yield


def survey(calibration: Calibration, sample: Batch, readers: Sequence[Reader]) -> int:
    """Run one sample: record which readers feed a batch norm; return the largest layer's bytes.

    Args:
        calibration: With the present model.
        sample: A batch of one.
        readers: Their ``norm`` is set.
    """
    owners = {reader.module: reader for reader in readers}
    outputs: dict[int, tuple[Reader, Tensor]] = {}  # the tensors are held, so that ids are unique
    largest = 1

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        seen = [each for each in (*args, output) if isinstance(each, Tensor)]
        largest = max(largest, sum(each.nbytes for each in seen))
        if isinstance(module, _BatchNorm) and args and id(args[0]) in outputs:
            outputs[id(args[0])][0].norm = module
        if module in owners and isinstance(output, Tensor):
            outputs[id(output)] = (owners[module], output)

    with ExitStack() as stack, torch.no_grad():
        for module in calibration.model.modules():
            if not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(note).remove)
        calibration.loss(None, sample)
    return largest


@contextmanager
def watched(readers: Iterable[Reader], samples: int) -> Iterator[None]:
    """Let readers record their inputs, of a total number of samples."""

    def watching(reader: Reader) -> Any:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = first_tensor(args, kwargs)
            if inputs is not None:
                reader.observe(inputs, samples)

        return watch

    with ExitStack() as stack:
        for reader in readers:
            handle = reader.module.register_forward_pre_hook(watching(reader), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def first_samples(calibration: Calibration, most: int) -> Iterator[Batch]:
    """Yield the first samples of a calibration, up to a number, in its batches.

    Raises:
        CalibrationError: If there are none, or fewer than expected.
    """
    left = most
    for batch in calibration.batches():
        yield cut(batch, 0, left)
        left -= batch_size(batch)
        if left <= 0:
            return


def in_pieces(batches: Iterable[Batch], size: int) -> list[Batch]:
    """Cut batches into pieces of so many samples at most."""
    return [
        cut(batch, start, start + size)
        for batch in batches
        for start in range(0, batch_size(batch), size)
    ]


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor that a layer is called with."""
    return next((each for each in [*args, *kwargs.values()] if isinstance(each, Tensor)), None)
