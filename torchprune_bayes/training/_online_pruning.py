"""Pruning by the posterior during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer

from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.laplace.posterior import Posterior
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import Schedule
from torchprune_bayes.training._pruner_state import checked_masks
from torchprune_bayes.training.keep_sparse import HeldZeros, keep_sparse, set_zero
from torchprune_bayes.training.undo import zeroing_undone
from torchprune_bayes.types import Masks


class OnlinePruning:
    """Set the weights that the posterior ranks lowest to zero, along a schedule.

    Args:
        space: Tensors under the prior; those that are weights of layers are pruned.
        optimizer: Its state is kept at zero where the weights are.
        schedule: Sparsity of these weights by number of the call; ``None`` prunes nothing.
        regrow: Whether zeros may come back.
        mode: What ranks the weights, see :meth:`~torchprune_bayes.laplace.Posterior.scores`.

    Attributes:
        masks: Boolean masks of permanently pruned entries.

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
        mode: str = "opd",
    ) -> None:
        self.masks: Masks = {}
        self._mode = mode
        self._space, self._optimizer = space, optimizer
        self._schedule, self._regrow = schedule, regrow
        self._names = [] if schedule is None else _weights_in(space)
        self._handle: HeldZeros | None = None

    @property
    def space(self) -> ParameterSpace:
        """All tensors, with the masks applied."""
        return self._space.with_masks(self.masks)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the entries of all tensors."""
        zeros = sum(int((tensor.value == 0).sum()) for tensor in self._space)
        return zeros / self._space.numel

    def is_due(self, now: int) -> bool:
        """Whether the schedule has something to do at this call."""
        return self._schedule is not None and self._schedule.is_due(now)

    def chosen(self, posterior: Posterior, now: int) -> Masks:
        """Masks of the sparsity that is due; changes nothing."""
        assert self._schedule is not None
        space = self.space.subset(self._names)
        scores = posterior.scores(self._mode)
        masks = space.at(scores[self._names[0]].device).masks()
        entries = sum(mask.numel() for mask in masks.values())
        pruned = sum(int((~mask).sum()) for mask in masks.values())
        missing = max(round(self._schedule(now) * entries) - pruned, 0)
        kept = smallest_k([scores[n] for n in masks], missing, list(masks.values()))
        return {t.name: mask.to(t.leaf.device) for t, mask in zip(space, kept, strict=True)}

    def prune(self, masks: Masks) -> None:
        """Set what ``masks`` prune to zero, and keep it there unless it may regrow."""
        for tensor in self._space.subset(masks):
            set_zero(tensor.leaf, ~masks[tensor.name])
        if not self._regrow:
            self.hold(masks)

    @contextmanager
    def kept_on_error(self, masks: Masks) -> Iterator[None]:
        """Restore weights, optimizer and masks if the body, which holds ``masks``, fails."""
        before, handle = self.masks, self._handle
        zeros = {t.leaf: ~masks[t.name].to(t.leaf.device) for t in self._space.subset(masks)}
        with zeroing_undone(zeros, self._optimizer):
            try:
                yield
            except BaseException:
                if self._handle is not handle:
                    self.remove()
                self.masks, self._handle = before, handle
                raise
        if handle is not None and handle is not self._handle:
            handle.remove()

    def check(self, masks: object) -> Masks:
        """Refuse masks that do not fit the tensors.

        Returns:
            The masks, boolean and where the tensors are.

        Raises:
            AlignmentError: If a mask belongs to no tensor or has another shape.
            ArgumentError: If one is no mask of zeros and ones.
        """
        return checked_masks(masks, self._space)

    def hold(self, masks: Mapping[str, Tensor]) -> None:
        """Keep zeros where ``masks`` are false, from now on; call in :meth:`kept_on_error`."""
        places = {tensor.name: tensor.leaf for tensor in self._space}
        by_leaf = {places[name]: mask for name, mask in masks.items()}
        self.masks = dict(masks)
        self._handle = keep_sparse(self._optimizer, by_leaf) if by_leaf else None

    def remove(self) -> None:
        """Stop keeping zeros."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _weights_in(space: ParameterSpace) -> list[str]:
    prunable = ParameterSpace(space.model).names
    weights = [name for name in space.names if name in prunable]
    if not weights:
        raise ArgumentError("Expected prunable weights in the calibration, got none.")
    return weights
