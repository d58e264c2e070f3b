"""What several processes have to do together so that all of them hold the same pruned model.

In plain words: ``DistributedDataParallel`` averages gradients and never looks at weights or masks
again, so one entry that is pruned in one process alone makes the replicas drift apart unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_bayes._processes import everywhere, rank, several, together
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.integrations._checkpoints import fingerprint
from torchprune_bayes.params import ParameterSpace, unwrap
from torchprune_bayes.training import GradualPruner
from torchprune_bayes.training._optimizers import moments_of

Value = TypeVar("Value")

logger = logging.getLogger("torchprune_bayes")


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model whose weights are spread over processes (FSDP, ZeRO-3, tensor parallel).

    Raises:
        ParameterError: If a parameter is sharded.
    """
    for name, parameter in model.named_parameters():
        # In turn: DTensors (FSDP2, tensor parallel), FSDP1's flat parameters, DeepSpeed's ZeRO-3.
        marks = ("placements", "_sharded_size", "ds_id")
        if any(hasattr(parameter, mark) for mark in marks):
            raise ParameterError(
                f"Expected whole tensors in every process, got the sharded `{name}`: decide on "
                "masks before sharding, then hold the zeros with `keep_sparse(optimizer, masks)`."
            )


def from_first(value: Value) -> Value:
    """Give every process the picklable value of the first one."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def same_everywhere(value: object) -> bool:
    """Whether all processes have an equal value."""
    return len(set(everywhere(value))) == 1


def summed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum each tensor over all processes; same keys and shapes everywhere."""
    for tensor in tensors.values() if several() else ():
        dist.all_reduce(tensor)
    return tensors


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors in place with those of the first process."""
    for tensor in tensors if several() else ():
        dist.broadcast(tensor.detach(), src=0)


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first one, as DDP does before each forward pass.

    Running statistics differ between processes after a step, and with them the gradients that each
    would take.
    """
    take_from_first(unwrap(model).buffers())


def exchanged_rows(parts: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield the rows of all processes to each of them, round by round in the order of the ranks.

    Each process computes its next part while the others compute theirs. Processes may have
    different numbers of parts and rows. If one fails, all do.

    Args:
        parts: Tensors ``[rows, D]`` of this process, with the same ``D`` and dtype in all.
        device: Where the parts are in this process.

    Raises:
        CalibrationError: If another process failed.
    """
    for part, shapes in _rounds(parts, lambda rows: (tuple(rows.shape), rows.dtype)):
        for source, found in enumerate(shapes):
            if found is None:
                continue
            shape, dtype = found
            rows = torch.empty(shape, dtype=dtype, device=device)
            if source == rank() and part is not None:
                rows = part.contiguous()
            if several():
                dist.broadcast(rows, src=source)
            yield rows


def exchanged(parts: Iterator[Value]) -> Iterator[Value]:
    """Yield the picklable parts of all processes to each of them, as :func:`exchanged_rows`."""
    for _, found in _rounds(parts, lambda part: part):
        yield from (part for part in found if part is not None)


def step_together(pruner: GradualPruner, optimizer: Optimizer | None) -> dict[str, Any] | None:
    """Call ``pruner.step()`` in every process; where something is pruned, all prune the same.

    Steps at which nothing is due cost no communication.

    Raises:
        CalibrationError: If it failed in another process.
    """
    if not pruner.due:
        return pruner.step()
    share_buffers(pruner.space.model)
    event = together(pruner.step)
    if event is not None:
        agree(pruner, optimizer)
    return event


def agree(pruner: GradualPruner, optimizer: Optimizer | None) -> None:
    """Give every process the masks, weights and optimizer state of the first one.

    Args:
        pruner: Has just pruned, in every process.
        optimizer: Its state of the pruned tensors is part of what must be the same.
    """
    if not same_everywhere(fingerprint(pruner.masks)):
        logger.warning("Masks differed between processes; those of the first one are taken.")
        pruner.load_state_dict(from_first(pruner.state_dict()))
        take_from_first(_moments(pruner.space, optimizer))
    take_from_first(tensor.leaf for tensor in pruner.space)


def _rounds(
    parts: Iterator[Value], describe: Callable[[Value], Any]
) -> Iterator[tuple[Value | None, list[Any]]]:
    while True:
        part = together(lambda: next(parts, None))
        found = everywhere(None if part is None else describe(part))
        if all(description is None for description in found):
            return
        yield part, found


def _moments(space: ParameterSpace, optimizer: Optimizer | None) -> Iterator[Tensor]:
    for tensor in space:
        yield from () if optimizer is None else moments_of(optimizer, tensor.leaf)
