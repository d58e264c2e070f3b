"""Whether a shrunk model computes what the whole one computes with the same units zeroed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes.errors import NumericalError
from torchprune_bayes.structured._forward import ForwardFunction, at_rest, run, tensors_in
from torchprune_bayes.structured._replacement import Change, replacement
from torchprune_bayes.structured.slicing import ShrinkPlan


def outputs_of(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFunction | None
) -> list[Tensor]:
    """Return the floating point outputs of a model in evaluation mode; the model is not changed."""
    with at_rest(model):
        return tensors_in(run(model, example_inputs, forward_fn))


def padded_outputs(
    model: nn.Module,
    plan: ShrinkPlan,
    final: Mapping[str, Tensor],
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
) -> list[Tensor]:
    """Return the outputs of the whole model with the tensors of the shrunk one, zeros elsewhere.

    Args:
        model: The model before the cut.
        plan: The plan.
        final: The tensors after it that differ, by first qualified name.
        example_inputs: What the model is called with.
        forward_fn: How to call it otherwise.
    """
    padded = {name: plan.expand(name, tensor.detach()) for name, tensor in final.items()}
    change: Change = replacement(model, padded, lambda name, gradient: gradient, {})
    try:
        return outputs_of(model, example_inputs, forward_fn)
    finally:
        change.undo()


def check_equal(masked: Sequence[Tensor], shrunk: Sequence[Tensor]) -> float:
    """Return the largest difference between outputs, refusing one that rounding cannot explain.

    Raises:
        NumericalError: If shapes differ, or values by more than ten times the square root of the
            precision, relative to the largest.
    """
    shapes = [[tuple(tensor.shape) for tensor in outputs] for outputs in (masked, shrunk)]
    if shapes[0] != shapes[1]:
        raise NumericalError(
            f"Expected outputs of shapes {shapes[0]} from the shrunk model, got {shapes[1]}."
        )
    largest = 0.0
    for one, other in zip(masked, shrunk, strict=True):
        if not one.numel():
            continue
        difference = float((one.nan_to_num().double() - other.nan_to_num().double()).abs().max())
        limit = (
            10 * torch.finfo(one.dtype).eps ** 0.5 * float(one.nan_to_num().double().abs().max())
        )
        if difference > limit:
            raise NumericalError(
                "Expected the shrunk model to compute what the whole one computes with the same "
                f"units zeroed, got a difference of {difference:.3g} where at most {limit:.3g} can "
                "be rounding: its wiring is not understood, and the model is left as it was."
            )
        largest = max(largest, difference)
    return largest
