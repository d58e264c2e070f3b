"""Pruning by the posterior while it is learnt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.laplace.posterior import Posterior
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import Schedule
from torchprune_bayes.training.keep_sparse import keep_sparse, set_zero
from torchprune_bayes.types import Masks


class OnlinePruning:
    """Set the weights of least posterior damage to zero, along a schedule.

    Args:
        space: Tensors under the prior; those that are weights of layers are pruned.
        optimizer: Its state is held at zero where the weights are.
        schedule: Sparsity of these weights by number of the call; ``None`` prunes nothing.
        regrow: Whether zeros may come back.

    Attributes:
        masks: Boolean masks of what has been pruned for good.

    Raises:
        ArgumentError: If there is a schedule and no weight to prune.
    """

    def __init__(
        self,
        space: ParameterSpace,
        optimizer: Optimizer,
        schedule: Schedule | None,
        *,
        regrow: bool,
    ) -> None:
        self.masks: Masks = {}
        self._space, self._optimizer = space, optimizer
        self._schedule, self._regrow = schedule, regrow
        self._names = [] if schedule is None else _weights_in(space)
        self._handle: RemovableHandle | None = None

    @property
    def space(self) -> ParameterSpace:
        """All tensors, seen through the masks."""
        return self._space.with_masks(self.masks)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the entries of all tensors."""
        zeros = sum(int((tensor.value == 0).sum()) for tensor in self._space)
        return zeros / self._space.numel

    def is_due(self, now: int) -> bool:
        """Whether the schedule has something to do at this call."""
        return self._schedule is not None and self._schedule.is_due(now)

    def prune(self, posterior: Posterior, now: int) -> None:
        """Prune to the sparsity that is due."""
        assert self._schedule is not None
        space = self.space.subset(self._names)
        scores, masks = posterior.scores(), space.masks()
        entries = sum(mask.numel() for mask in masks.values())
        gone = sum(int((~mask).sum()) for mask in masks.values())
        missing = max(round(self._schedule(now) * entries) - gone, 0)
        kept = smallest_k([scores[n] for n in masks], missing, list(masks.values()))
        found = dict(zip(masks, kept, strict=True))
        for tensor in space:
            set_zero(tensor.leaf, ~found[tensor.name])
        if not self._regrow:
            self.hold(found)

    def check(self, masks: Mapping[str, Tensor]) -> None:
        """Refuse masks that do not fit the tensors.

        Raises:
            AlignmentError: In this case.
        """
        for tensor in self._space.subset(masks):
            if masks[tensor.name].shape != tensor.leaf.shape:
                raise AlignmentError(
                    f"Expected a mask of shape {tuple(tensor.leaf.shape)} for `{tensor.name}`, got "
                    f"{tuple(masks[tensor.name].shape)}."
                )

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Keep zeros where ``masks`` are false, from now on."""
        places = {tensor.name: tensor.leaf for tensor in self._space}
        self.masks = {n: mask.to(places[n].device, torch.bool) for n, mask in masks.items()}
        self.remove()
        if self.masks:
            held = {places[name]: mask for name, mask in self.masks.items()}
            self._handle = keep_sparse(self._optimizer, held)

    def remove(self) -> None:
        """Let zeros go."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _weights_in(space: ParameterSpace) -> list[str]:
    prunable = ParameterSpace(space.model).names
    found = [name for name in space.names if name in prunable]
    if not found:
        raise ArgumentError("Expected prunable weights in the calibration, got none.")
    return found
