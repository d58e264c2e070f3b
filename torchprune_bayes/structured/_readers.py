"""All layers that read units: finding and watching them, and trying other tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchprune_bayes.calibration import Batch, Calibration, batch_size
from torchprune_bayes.calibration.batches import cut
from torchprune_bayes.structured._layer_inputs import is_readable
from torchprune_bayes.structured._reader import Reader
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.slicing import first_names

Tensors: TypeAlias = dict[nn.Module, dict[str, Tensor]]
"""Parameters and buffers by local name, for some modules."""

Rows: TypeAlias = list[tuple[str, int, Tensor]]
"""Local name of a parameter, a dimension of it, and indices along it."""


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
    is installed when a module is called remains until the pass ends. It takes the dtype and
    the device of these values, which are not those of a model in half precision. ``tensors``
    may grow meanwhile.
    """

    def install(module: nn.Module, args: tuple[Any, ...]) -> None:
        for key, tensor in tensors.get(module, {}).items():
            table: dict[str, Any] = (
                module._parameters if key in module._parameters else module._buffers
            )
            table[key] = tensor if table[key] is None else tensor.to(table[key])

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
    """Return the first samples of a calibration, up to a number, in its batches.

    Raises:
        CalibrationError: If there are none, or fewer than expected.
    """
    return leading(calibration.batches(), most)


def leading(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """Yield batches until they have so many samples, the last one cut, and look at no more."""
    left = most
    for batch in batches:
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
