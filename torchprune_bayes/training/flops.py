"""FLOPs of a whole training, of a model that changes during it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchprune_bayes._checks import check_count
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured import UnitCosts
from torchprune_bayes.wiring.forward import ForwardFunction

FORWARD = 1
"""Passes of a sample that SNIP-it's cumulative FLOPs count: the forward one."""


class TrainingFlops:
    """Add up the FLOPs of all samples of a training, each with the model at its time.

    SNIP-it (arXiv:2006.00896) reports the FLOPs of all forward passes of a training, dense over
    pruned. Its code counts a multiplication with an addition as one operation, here they are two;
    it counts the norms of a probe of eight images for each image, here norms count nothing. Ratios
    are as in the paper but for the latter. Zeros cost what other weights cost: only removed
    units save anything.

    Args:
        example_inputs: What the model is called with: a tensor, a tuple of positional or a mapping
            of keyword arguments, whose first tensor's first dimension is the number of samples.
        passes: Forward passes counted per sample: 1 as in the paper, 3 with the backward
            pass, which costs about two.
        forward_fn: ``forward_fn(model, example_inputs) -> output`` for other ways to call it.

    Attributes:
        total: FLOPs so far.

    Raises:
        ArgumentError: If there is no tensor in the inputs, or ``passes`` is below 1.

    Cost: one forward pass whenever the shapes of the parameters have changed.

    Example:
        >>> import torch
        >>> flops = TrainingFlops(torch.zeros(1, 4))
        >>> flops.add(nn.Linear(4, 2), samples=10)
        160
        >>> flops.add(nn.Linear(4, 1), samples=10)
        80
        >>> flops.total
        240
    """

    def __init__(
        self,
        example_inputs: Any,
        *,
        passes: int = FORWARD,
        forward_fn: ForwardFunction | None = None,
    ) -> None:
        check_count("passes", passes)
        self._inputs, self._forward_fn, self.passes = example_inputs, forward_fn, passes
        self._samples = _batch_size(example_inputs)
        self._known: tuple[Any, int] | None = None
        self.total = 0

    def add(self, model: nn.Module, samples: int) -> int:
        """Count samples processed by the model in its present size.

        Returns:
            FLOPs that were added.
        """
        check_count("samples", samples, minimum=0)
        added = round(self._of_one_batch(model) * self.passes * samples / self._samples)
        self.total += added
        return added

    def _of_one_batch(self, model: nn.Module) -> int:
        inner = unwrap(model)
        shapes = tuple(tuple(parameter.shape) for parameter in inner.parameters())
        if self._known is None or self._known[0] != shapes:
            costs = UnitCosts.measure(inner, (), self._inputs, self._forward_fn)
            self._known = (shapes, costs.flops({}))
        return self._known[1]


def _batch_size(inputs: Any) -> int:
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    candidates = [inputs] if isinstance(inputs, Tensor) else list(values)
    sizes = [len(value) for value in candidates if isinstance(value, Tensor) and value.ndim]
    if not sizes or not sizes[0]:
        raise ArgumentError("Expected a tensor with samples in `example_inputs`, got none.")
    return sizes[0]
