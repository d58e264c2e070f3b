"""The selection of CBS: starts, local search, and the mask of smallest held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchprune_bayes._numerics.patterns import merged
from torchprune_bayes._numerics.perturbation import perturbed_in_groups, perturbed_keep
from torchprune_bayes._numerics.post_update import PostUpdateObjective
from torchprune_bayes._numerics.swaps import SelectionObjective, SwapObjective
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.methods._obs_step import Stage, Update
from torchprune_bayes.methods._pattern import Pattern
from torchprune_bayes.types import Masks

OBJECTIVES: dict[str, Callable[..., SwapObjective]] = {
    "selection": SelectionObjective,
    "post_update": PostUpdateObjective,
}
_PATIENCE = 5  # iterations without a smaller loss


@dataclass(frozen=True)
class SwapSelection:
    """One search for what to keep, among masks of as many entries as its start has.

    Args:
        stage: Where it takes place.
        objective: A key of ``OBJECTIVES``: what swaps must lower.
        search: :func:`swap_search` with its options.
        pattern: Groups that are swapped whole, or within which entries are.
        update: Update of the kept weights when masks are compared after it.
        shared: Whether entries of different tensors may be swapped.
    """

    stage: Stage
    objective: str
    search: Callable[..., Iterator[Tensor]]
    pattern: Pattern | None = None
    update: Update = "joint"
    shared: bool = True

    def best(
        self, start: Masks, starts: int = 1, generator: torch.Generator | None = None
    ) -> Masks:
        """Masks of smallest loss among the start, random other starts, and those of the search.

        Args:
            start: Initial masks.
            starts: How many starts to compare, this one included.
            generator: For the random ones, on the CPU.
        """
        remaining = self._fisher.remaining
        best = self._judged(remaining.gather(start))
        if generator is not None:
            members = self._members(best.keep)
            others = (self._perturbed(best.keep, members, generator) for _ in range(starts - 1))
            best = min([best, *map(self._judged, others)], key=_loss)
        for where, gradients in self._fisher.with_blocks_in_memory().whole_blocks():
            best = self._searched(best, where, gradients)
        return remaining.scatter(best.keep)

    def _searched(self, best: _Judged, where: slice, gradients: Tensor) -> _Judged:
        """The best mask on the way of a search through some blocks."""
        shape, remaining, since = gradients.shape[::2], self._remaining()[where], 0
        for kept in self._search_through(best.keep[where].unflatten(0, shape), where, gradients):
            keep = best.keep.clone()
            keep[where] = kept.flatten() & remaining
            judged = self._judged(keep)
            since = 0 if judged.loss < best.loss else since + 1
            best = min(best, judged, key=_loss)
            if since == _PATIENCE:
                break
        return best

    def _search_through(self, keep: Tensor, where: slice, gradients: Tensor) -> Iterator[Tensor]:
        weights = self._weights()[where].unflatten(0, keep.shape)
        own, damping = self._classes()[where].unflatten(0, keep.shape), self._fisher.damping
        make = OBJECTIVES[self.objective]
        if self.pattern is None or not self.pattern.takes_whole_groups:
            within = None if self.pattern is None else self.pattern.size
            objective = make(gradients, weights, keep, damping)
            yield from self.search(objective, groups=own, within=within)
            return
        size = self.pattern.size
        keep, own = (v.unflatten(-1, (-1, size)).amax(-1) for v in (keep, own))
        objective = make(*merged(gradients, weights, size), keep, damping)
        for kept in self.search(objective, groups=own):
            yield kept.repeat_interleave(size, dim=-1)

    def _perturbed(
        self, keep: Tensor, members: list[_Members], generator: torch.Generator
    ) -> Tensor:
        """A random magnitude perturbation that keeps as many entries of each class as ``keep``."""
        scores = self._weights().abs()
        if self.pattern is None:
            return _perturbed_classes(scores, members, generator)
        size = self.pattern.size
        scores, keep = scores.unflatten(-1, (-1, size)), keep.unflatten(-1, (-1, size))
        if self.pattern.takes_whole_groups:
            kept = _perturbed_classes(scores.norm(dim=-1), members, generator)
            return kept.repeat_interleave(size) & self._remaining()
        scores = scores.masked_fill(self._classes().view_as(scores) < 0, -1.0)
        return perturbed_in_groups(scores, keep.sum(-1), generator).flatten()

    def _members(self, keep: Tensor) -> list[_Members]:
        """The classes of entries, or of whole groups; the device is asked once for all."""
        classes = self._classes()
        if self.pattern is not None:
            if not self.pattern.takes_whole_groups:
                return []
            size = self.pattern.size
            keep, classes = (v.unflatten(-1, (-1, size)).amax(-1) for v in (keep, classes))
        where = [classes == number for number in classes.unique().tolist()]
        counts = torch.stack([(keep & chosen).sum() for chosen in where]).tolist()
        return [_Members(*pair) for pair in zip(where, counts, strict=True)]

    def _judged(self, keep: Tensor) -> _Judged:
        loss = self._loss(keep)
        return _Judged(keep, math.inf if math.isnan(loss) else loss)

    def _loss(self, keep: Tensor) -> float:
        """Held-out loss of a mask; with only a curvature, that of the quadratic model."""
        flat = moved = self._weights()
        if self.objective == "post_update" and self.update != "none":
            single = self.update == "single"
            moved = flat + self._fisher.directions(flat, keep, single=single).compensation.to(flat)
        moved = torch.where(keep, moved, 0.0)
        held_out = self.stage.step.calibration
        if held_out is None:
            return self._fisher.quadratic(moved - flat)
        return held_out.held_out_loss(self._fisher.remaining.scatter(moved)).value

    @cached_property
    def _fisher(self) -> EmpiricalFisher:
        # Of all that the step began with: swaps bear on entries that are pruned already.
        return self.stage.step.fisher.damped(self.stage.fisher.damping)

    def _weights(self) -> Tensor:
        return self.stage.step.flat

    def _remaining(self) -> Tensor:
        return self._fisher.remaining.gather(self.stage.masks)

    def _classes(self) -> Tensor:
        # Entries trade places within a class: all, or a tensor where each has its own share.
        remaining = self._fisher.remaining
        numbers = {
            name: torch.full(mask.shape, 0 if self.shared else index, device=mask.device)
            for index, (name, mask) in enumerate(remaining.masks.items())
        }
        return remaining.gather(numbers).masked_fill(~self._remaining(), -1)


@dataclass(frozen=True)
class _Judged:
    """Masks of a step, and their loss."""

    keep: Tensor
    loss: float


def _loss(judged: _Judged) -> float:
    return judged.loss


@dataclass(frozen=True)
class _Members:
    """Entries that may trade places: which they are, and how many of them are kept."""

    where: Tensor
    kept: int


def _perturbed_classes(
    scores: Tensor, members: list[_Members], generator: torch.Generator
) -> Tensor:
    other = torch.zeros_like(scores, dtype=torch.bool)
    for one in members:
        other[one.where] = perturbed_keep(scores[one.where], one.kept, generator)
    return other
