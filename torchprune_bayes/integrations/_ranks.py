"""Exchanges between processes that keep all of them on the same pruned model.

In plain words: ``DistributedDataParallel`` averages gradients and never compares weights or masks
again, so one entry that is pruned in only one process makes the replicas diverge unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchprune_bayes._distributed import all_gathered, is_distributed, on_all_ranks, rank
from torchprune_bayes.errors import AlignmentError, ParameterError
from torchprune_bayes.params import unwrap
from torchprune_bayes.training.undo import tensors_kept_on_error

Value = TypeVar("Value")


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose weights are spread over processes (FSDP, ZeRO-3, tensor parallel).

    Raises:
        ParameterError: If a parameter is sharded.
    """
    for name, parameter in model.named_parameters():
        # In this order: DTensors (FSDP2, tensor parallel), FSDP1's flat parameters, DeepSpeed's
        # ZeRO-3.
        marks = ("placements", "_sharded_size", "ds_id")
        if any(hasattr(parameter, mark) for mark in marks):
            raise ParameterError(
                f"Expected whole tensors in every process, got the sharded `{name}`: decide on "
                "masks before sharding, then keep the zeros with `keep_sparse(optimizer, masks)`."
            )


def from_first(value: Value) -> Value:
    """Give every process the picklable value of the first one.

    Raises:
        CalibrationError: If another process failed before this call.
    """
    return all_gathered(value if rank() == 0 else None)[0]  # type: ignore[return-value]


def same_everywhere(value: object) -> bool:
    """Whether all processes have an equal value."""
    return len(set(all_gathered(value))) == 1


def summed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum each tensor over all processes, into new tensors if there are several.

    Raises:
        AlignmentError: If names or shapes differ between processes.
        CalibrationError: If another process failed before this call.
    """
    _check_alike(tensors.items())
    if not is_distributed():
        return tensors
    sums = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in sums.values():
        dist.all_reduce(tensor)
    return sums


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors in place with those of the first process.

    Raises:
        AlignmentError: If shapes differ between processes; nothing is changed then.
        CalibrationError: If another process failed before this call.
    """
    if not is_distributed():
        return
    own = list(tensors)
    _check_alike(enumerate(own))
    for tensor in own:
        dist.broadcast(tensor.detach(), src=0)


@contextmanager
def shared_buffers(model: nn.Module) -> Iterator[None]:
    """Give every process the buffers of the first one, as DDP does before each forward pass.

    Running statistics differ between processes after a step, and with them the gradients that each
    would compute. If the body fails, every process restores its own.
    """
    buffers = list(unwrap(model).buffers()) if is_distributed() else []
    with tensors_kept_on_error([(buffer, None) for buffer in buffers]):
        take_from_first(buffers)
        yield


def exchanged_rows(parts: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield the rows of all processes to each of them, round by round in the order of the ranks.

    Each process computes its next part while the others compute theirs. Processes may have
    different numbers of parts and rows. If one fails, all do, also if the consumer of the rows
    fails.

    Args:
        parts: Tensors ``[rows, D]`` of this process, with the same ``D`` and dtype in all.
        device: Device of the parts in this process.

    Raises:
        CalibrationError: If another process failed.
    """
    for part, shapes in _rounds(parts, lambda rows: (tuple(rows.shape), rows.dtype)):
        for source, layout in enumerate(shapes):
            if layout is None:
                continue
            shape, dtype = layout
            rows = torch.empty(shape, dtype=dtype, device=device)
            if source == rank() and part is not None:
                rows = part.contiguous()
            all_gathered(None)  # the consumer of the last rows may have failed
            if is_distributed():
                dist.broadcast(rows, src=source)
            yield rows


def exchanged(parts: Iterator[Value]) -> Iterator[Value]:
    """Yield the picklable parts of all processes to each of them, as :func:`exchanged_rows`."""
    for _, values in _rounds(parts, lambda part: part):
        yield from (part for part in values if part is not None)


def _check_alike(tensors: Iterable[tuple[object, Tensor]]) -> None:
    if not same_everywhere(tuple((name, tuple(tensor.shape)) for name, tensor in tensors)):
        raise AlignmentError("Expected the same tensors in all processes, got different ones.")


def _rounds(
    parts: Iterator[Value], describe: Callable[[Value], Any]
) -> Iterator[tuple[Value | None, list[Any]]]:
    while True:
        part = on_all_ranks(lambda: next(parts, None))
        descriptions = all_gathered(None if part is None else describe(part))
        if all(description is None for description in descriptions):
            return
        yield part, descriptions
