"""Patterns of zeros that hardware makes use of, along the inputs of a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._numerics.patterns import group_scores, n_of_m_ranks, n_of_m_scores
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.methods._target import Target
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.types import Masks, Scores

Amount = float | int | Mapping[str, int]


@dataclass(frozen=True)
class Pattern:
    """``N`` of every ``M`` inputs are kept, or ``M`` inputs are kept or pruned together.

    A group is ``M`` inputs, from a multiple of ``M`` on, that meet the same output: for a
    convolution ``M`` input channels at one place of its kernel, as sparse matrix units have it.

    Args:
        size: ``M``.
        kept: ``N``; 0 for whole groups.
    """

    size: int
    kept: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``"N:M"``, or ``"1xM"`` for whole groups.

        Example:
            >>> Pattern.parse("2:4"), Pattern.parse("1x4")
            (Pattern(size=4, kept=2), Pattern(size=4, kept=0))
        """
        match = re.fullmatch(r"(\d+)([:x])(\d+)", str(text))
        if match:
            first, kind, size = int(match[1]), match[2], int(match[3])
            if (first == 1 and size > 1) if kind == "x" else 0 < first < size:
                return cls(size, 0 if kind == "x" else first)
        raise ArgumentError(f"Expected `pattern` like '2:4' or '1x4', got {text!r}.")

    @classmethod
    def n_of_m(cls, text: str) -> Pattern:
        """Read ``"N:M"`` only."""
        pattern = cls.parse(text)
        if pattern.takes_whole_groups:
            raise ArgumentError(f"Expected `pattern` like '2:4', got {text!r}.")
        return pattern

    def __str__(self) -> str:
        """What :meth:`parse` reads."""
        return f"1x{self.size}" if self.takes_whole_groups else f"{self.kept}:{self.size}"

    @property
    def takes_whole_groups(self) -> bool:
        """Whether groups are kept or pruned whole."""
        return not self.kept

    def amount(self, asked: Amount | None) -> Amount | None:
        """The amount asked for; none at all is ``1 − N/M``, the only fraction that N:M can be."""
        return self.sparsity if asked is None and not self.takes_whole_groups else asked

    @property
    def sparsity(self) -> float:
        """``1 − N/M``."""
        return 1.0 - self.kept / self.size

    def on_the_way(self, steps: int) -> list[Pattern]:
        """The patterns of even steps from everything to ``N:M``, at most ``M − N`` of them.

        Example:
            >>> [str(pattern) for pattern in Pattern(8, 4).on_the_way(4)]
            ['7:8', '6:8', '5:8', '4:8']
        """
        gone = self.size - self.kept
        rounds = min(steps, gone)
        kept = [self.size - round(gone * step / rounds) for step in range(1, rounds + 1)]
        return [Pattern(self.size, n) for n in kept]

    def dims(self, space: ParameterSpace) -> dict[str, int]:
        """The dimension of the inputs of each tensor.

        Raises:
            ParameterError: If a tensor has none, or no multiple of ``M`` inputs.
        """
        dims = {}
        for tensor in space:
            shape = tuple(tensor.leaf.shape)
            dim = kind_of(tensor.module).input_dim
            if len(shape) < 2 or shape[dim] % self.size:
                raise ParameterError(
                    f"Expected a multiple of {self.size} inputs in `{tensor.name}` for the "
                    f"pattern, got the shape {shape}: leave it out."
                )
            dims[tensor.name] = dim
        return dims

    def scores(self, fisher: EmpiricalFisher, weights: Tensor, remaining: Tensor) -> Tensor:
        """Scores by the rise of the quadratic model with the interactions within a group.

        Args:
            fisher: In the order of the groups.
            weights: ``[D]`` in that order, float64.
            remaining: Boolean ``[D]``.

        Returns:
            ``[D]`` float64; of whole groups every entry has the score of its group.
        """
        parts = []
        for where, inverse in fisher.inverses():
            w, left = (v[where].unflatten(0, inverse.shape) for v in (weights, remaining))
            if self.takes_whole_groups:
                scores = group_scores(inverse, w, self.size)
            else:
                scores = n_of_m_scores(inverse, w, self.kept, self.size, left)
            parts.append(scores.flatten())
        return torch.cat(parts)

    def ranks(self, scores: Tensor, remaining: Tensor) -> Tensor:
        """Scores in the pattern from those of single entries, ``[..., B]``, not negative."""
        if self.takes_whole_groups:
            norms = scores.unflatten(-1, (-1, self.size)).norm(dim=-1)
            return norms.repeat_interleave(self.size, dim=-1)
        return n_of_m_ranks(scores, self.kept, self.size, remaining)

    def largest(self, values: Tensor, remaining: Tensor) -> Tensor:
        """The ``N`` remaining entries of largest values, not negative, along the last dimension.

        That dimension is one group of ``M``, or what is left of one at the end of a row.

        Example:
            >>> values = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
            >>> remaining = torch.tensor([[True, True, True, False]])
            >>> Pattern.n_of_m("2:4").largest(values, remaining)
            tensor([[ True, False,  True, False]])
        """
        ranked = values.masked_fill(~remaining, -1.0)
        best = ranked.topk(min(self.kept, ranked.shape[-1]), dim=-1).indices
        return torch.zeros_like(remaining).scatter(-1, best, True) & remaining

    def largest_of_rows(self, values: Tensor, remaining: Tensor) -> Tensor:
        """:meth:`largest` of every group of a matrix ``[rows, n]``."""
        groups = (tensor.unflatten(1, (-1, self.size)) for tensor in (values, remaining))
        return self.largest(*groups).flatten(1)

    def target(
        self, masks: Masks, dims: Mapping[str, int], amount: Amount, *, steps: int, **options: str
    ) -> Target:
        """What to prune in how many steps; N:M is then what the smallest scores amount to.

        Raises:
            ArgumentError: If the amount does not go with the pattern.
        """
        if self.takes_whole_groups:
            return GroupTarget(masks, amount, steps=steps, dims=dims, size=self.size, **options)  # type: ignore[arg-type]
        needed = {
            name: int((grouped(mask, dims[name], self.size).sum(-1) - self.kept).clamp_min(0).sum())
            for name, mask in masks.items()
        }
        total = sum(needed.values())
        fits = isinstance(amount, float) and abs(amount - self.sparsity) < 1e-9
        if not fits and amount not in (total, needed):
            asked = self.sparsity if isinstance(amount, float) else total
            given = sum(amount.values()) if isinstance(amount, Mapping) else amount
            raise ArgumentError(
                f"Expected amount={asked:g}, or none, with the pattern {self}, got {given!r}: it "
                "is reached in one call, so a schedule of it has one step, as one_shot has."
            )
        layered = options.get("scope") == "layer"
        return Target(masks, needed if layered else total, steps=steps, **options)  # type: ignore[arg-type]


def kept_by(
    space: ParameterSpace, scores: Scores, amount: Any, *, pattern: Pattern | None, scope: str
) -> Masks:
    """Masks without the entries of smallest scores, in one step.

    Args:
        space: Masks, and layers for a pattern.
        scores: Not negative.
        amount: Fraction or number of the remaining entries to prune.
        pattern: The pattern of groups.
        scope: ``"global"`` or ``"layer"``.
    """
    masks = space.masks()
    if pattern is None:
        return Target(masks, amount, scope=scope).keep(0, scores, masks)
    dims = pattern.dims(space)
    target = pattern.target(masks, dims, amount, steps=1, scope=scope)
    ranks = {}
    for name, dim in dims.items():
        finite = scores[name].clamp_max(torch.finfo(scores[name].dtype).max / 4)
        along, remaining = (tensor.movedim(dim, -1) for tensor in (finite, masks[name]))
        ranks[name] = pattern.ranks(along, remaining).movedim(-1, dim)
    return target.keep(0, ranks, masks)


@dataclass(frozen=True)
class GroupTarget(Target):
    """A target counted in groups of ``size`` entries along ``dims``, pruned or kept whole.

    A group remains as long as one of its entries does; a fraction is one of the remaining groups.
    """

    dims: Mapping[str, int] = field(kw_only=True)
    size: int = field(kw_only=True)

    def keep(self, step: int, scores: Scores, masks: Masks) -> Masks:
        """Masks after ``step``, pruning the groups with the smallest scores."""
        first = {name: self._grouped(name, score)[..., 0] for name, score in scores.items()}
        kept = self.groups().keep(step, first, self._remaining(masks))
        return {
            name: mask & ungrouped(kept[name], self.dims[name], self.size)
            for name, mask in masks.items()
        }

    def groups(self) -> Target:
        """The same target with groups for entries."""
        return Target(
            self._remaining(self.initial), self._amount(), self.scope, self.steps, self.path
        )

    def _remaining(self, masks: Masks) -> Masks:
        return {name: self._grouped(name, mask).any(-1) for name, mask in masks.items()}

    def _grouped(self, name: str, tensor: Tensor) -> Tensor:
        return grouped(tensor, self.dims[name], self.size)

    def _amount(self) -> Amount:
        if isinstance(self.amount, Mapping):
            return {name: self._groups_of(count) for name, count in self.amount.items()}
        return self.amount if isinstance(self.amount, float) else self._groups_of(self.amount)

    def _groups_of(self, count: int) -> int:
        if count % self.size:
            raise ArgumentError(
                f"Expected a multiple of {self.size} entries for `amount`, got {count}."
            )
        return count // self.size


def grouped(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Neighbours along ``dim`` as the last dimension.

    Example:
        >>> import torch
        >>> grouped(torch.arange(8).reshape(4, 2), dim=0, size=2).tolist()
        [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]
    """
    return tensor.movedim(dim, -1).unflatten(-1, (-1, size))


def ungrouped(groups: Tensor, dim: int, size: int) -> Tensor:
    """One value per group, given to all its entries, in the shape of the tensor."""
    return groups.repeat_interleave(size, dim=-1).movedim(-1, dim)
