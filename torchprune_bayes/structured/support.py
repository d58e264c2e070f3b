"""What can be said of shrinking before it: whether a model is supported, and how far it can go."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.gates import NoiseGate
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured._shrinking import Target
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.ranking import blocks_to_reach, rank_units
from torchprune_bayes.structured.tracing import (
    Heads,
    Units,
    check_plain,
    find_units,
    without_ignored,
)
from torchprune_bayes.structured.unit_costs import UnitCosts
from torchprune_bayes.wiring.forward import ForwardFunction

OF_THE_MODEL = ("target", "ignored", "groups", "min_keep", "round_to", "forward_fn", "heads")
"""Options of ``shrink`` that say what can be removed; :func:`check_shrinkable` takes them all."""


def check_shrinkable(
    model: nn.Module,
    example_inputs: Any,
    *,
    sparsity: float | None = None,
    target: Target = "params",
    ignored: Collection[nn.Module | str] = (),
    groups: Sequence[UnitGroup] | None = None,
    min_keep: int = 1,
    round_to: int = 1,
    forward_fn: ForwardFunction | None = None,
    heads: Heads = "whole",
) -> Units:
    """Check that :func:`~torchprune_bayes.structured.shrink` can shrink a model.

    For what is to be shrunk during or after a long training: unknown wirings, masks, wrappers and
    floors that do not allow the sparsity are detected before it. The model is not changed.

    Args:
        model: The model; ``DataParallel`` and ``torch.compile`` are looked through.
        example_inputs: As for ``shrink``.
        sparsity: Of the whole, to be reached in the end; ``None`` does not check how far.
            Not checked are ``"latency"`` and ``"memory"``, which need measurements.
        target: What the sparsity counts.
        ignored: As for ``shrink``.
        groups: As for ``shrink``.
        min_keep: As for ``shrink``.
        round_to: As for ``shrink``.
        forward_fn: As for ``shrink``.
        heads: As for ``shrink``.

    Returns:
        The units that can be removed, and what was left out and why.

    Raises:
        ArgumentError: If there are no units to remove, or too few for the sparsity.
        ParameterError: If the model is masked, parametrized, sharded or distributed, or cannot be
            supported.

    Cost: about five forward passes, and a copy of the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> units = check_shrinkable(model, torch.zeros(1, 4), sparsity=0.5)
        >>> [group.name for group in units.groups]
        ['0']
        >>> check_shrinkable(model, torch.zeros(1, 4), sparsity=0.9)
        Traceback (most recent call last):
        ...
        torchprune_bayes.errors.ArgumentError: Expected a sparsity of at most 0.844828 in params, \
which ignored layers and floors allow, got 0.9: ask for less, or lower `min_keep` or `round_to`.
    """
    inner = plain_model(model)
    units = units_to_remove(inner, example_inputs, sparsity, ignored, groups, forward_fn, heads)
    if sparsity and target in ("params", "flops", "channels"):
        scores = {group.name: torch.zeros(group.units) for group in units.groups}
        ranking = rank_units(units.groups, scores, min_keep=min_keep, round_to=round_to)
        costs = UnitCosts.measure(inner, units.groups, example_inputs, forward_fn, units.flops)
        blocks_to_reach(ranking, costs, target, sparsity)
    return units


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside of its wrappers, if its parameters can be replaced.

    Raises:
        ParameterError: If it is wrapped for distributed training, masked or parametrized, or has
            noise gates.
    """
    inner = unwrap(model)
    for name, module in [("the model", model), *model.named_modules()]:
        kind = type(module).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise ParameterError(
                f"Expected a model before it is wrapped for distributed training, got {kind} at "
                f"`{name or 'the model'}`: shrink the module inside, then wrap it again."
            )
        if isinstance(module, NoiseGate):
            raise ParameterError(
                f"Expected a model without noise gates, got one at `{name}`: call `fold_gates` "
                "first; a BMRSImportance made before that keeps the gates' decisions."
            )
    check_plain(inner)
    return inner


def units_to_remove(
    model: nn.Module,
    example_inputs: Any,
    sparsity: float | None,
    ignored: Collection[nn.Module | str],
    groups: Sequence[UnitGroup] | None,
    forward_fn: ForwardFunction | None,
    heads: Heads,
) -> Units:
    """Find the units of a model, or take those that are known.

    Raises:
        ArgumentError: If there are none, but some are to be removed.
    """
    if groups is None:
        units = find_units(
            model, example_inputs, ignored=ignored, forward_fn=forward_fn, heads=heads
        )
    else:
        units = Units(without_ignored(model, groups, ignored))
    if not units.groups and sparsity != 0.0:
        modules = dict(model.named_modules())
        why = "; ".join(
            f"`{name}` ({type(modules[name.partition(':')[0]]).__name__}): {reason}"
            for name, reason in [*units.left_out.items()][:3]
        )
        raise ArgumentError(
            f"Expected units that can be removed, got none in {type(model).__name__}, so that a "
            f"sparsity of at most 0 can be reached{': ' + why if why else ''}."
        )
    return units
