"""WoodFisher for whole units: the joint optimal brain surgeon cost of all that a unit owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_fraction, check_positive
from torchprune_bayes._numerics.joint_cost import JointCosts, sums_of_units
from torchprune_bayes._numerics.precision import float64_device, wide
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature import EmpiricalFisher
from torchprune_bayes.structured.groups import Kept, UnitGroup
from torchprune_bayes.structured.importances._calibrated import (
    CalibratedImportance,
    pieces_of,
    space_of,
)
from torchprune_bayes.structured.slicing import plan_of

_ROLES = {"all": ("producer", "norm", "consumer"), "columns": ("consumer",)}
_SCALES = (0.0, 0.25, 0.5, 1.0)


class WoodFisherImportance(CalibratedImportance):
    """Predicted rise of the loss ``½ w_gᵀ((F⁻¹)_gg)⁻¹w_g`` when all that a unit owns is removed.

    `WoodFisher (Singh and Alistarh, 2020) <https://arxiv.org/abs/2004.14340>`_ for coupled groups:
    ``g`` are the rows, biases, norm parameters and columns of one unit in all layers, ``F`` is the
    damped empirical Fisher ``λI + (1/N) Σ_n g_n g_nᵀ`` in blocks, and the other weights of a block
    compensate for ``g``. When the units are chosen, the weights that stay take the joint update for
    all that is removed from their block (:mod:`torchprune_bayes._numerics.obs`).

    Args:
        calibration: Data, model and loss; one gradient for each mini-batch.
        block_size: Blocks of the Fisher as in :class:`~torchprune_bayes.curvature.EmpiricalFisher`
            (``"full"``, ``"tensor"``, an int, ``"auto"``) over all tensors in which units own
            something; or ``"unit"``, the entries of one unit alone, where nothing makes up for it
            and the cost is ``½ w_gᵀF_gg w_g``.
        members: What a unit owns here: ``"all"``; or ``"columns"``, what reads it, without which
            the rest does nothing. A BatchNorm undoes any change of the scale of what it normalises,
            so that with all members the same removal counts once in some layers and twice in
            others. With columns and ``"unit"`` a score is one estimate of the loss for the unit as
            a whole, and is divided by what it costs.
        damping: ``λ``; ``"auto"`` takes the mean squared gradient, its natural unit.
        update_scale: Share of the update that is taken; ``"auto"`` takes the one of 0, ¼, ½ and 1
            with the smallest loss on held-out samples; 0 moves nothing.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is no calibration.

    Cost: one pass over the data where the gradients fit into a quarter of the calibration's memory,
    else one for each group of blocks; ``N²D`` and for each unit ``N²m + n³/3`` with its ``m``
    entries and ``n = min(N, m)``. ``"unit"``: ``N D``, and memory for a few gradients.

    Example:
        >>> from torchprune_bayes.structured import find_groups
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> calibration = Calibration(model, data, nn.functional.cross_entropy)
        >>> [group] = find_groups(model, torch.zeros(1, 4))
        >>> alone = WoodFisherImportance(calibration, block_size="unit").score(group, model)
        >>> with_help = WoodFisherImportance(calibration, block_size="full").score(group, model)
        >>> bool((with_help < alone).all() and (with_help > 0).all())
        True
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        block_size: int | str = "auto",
        members: Literal["all", "columns"] = "all",
        damping: float | str = "auto",
        update_scale: float | str = "auto",
    ) -> None:
        super().__init__(calibration)
        EmpiricalFisher(block_size="full" if block_size == "unit" else block_size)
        if damping != "auto":
            check_positive("damping", damping)
        if update_scale != "auto":
            check_fraction("update_scale", update_scale)
        check_choice("members", members, _ROLES)
        self.block_size, self.damping, self.update_scale = block_size, damping, update_scale
        self.members = members
        self.joint = members == "columns" and block_size == "unit"
        self._fisher: EmpiricalFisher | None = None

    def measure(self, calibration: Calibration, groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
        """The joint costs of all groups, in one sweep over the blocks."""
        self._fisher = None
        groups = [
            replace(group, slices=tuple(pieces_of(group, *_ROLES[self.members])))
            for group in groups
        ]
        pieces = [piece for group in groups for piece in group.slices]
        space, names = space_of(calibration.model, pieces)
        calibration = calibration.with_space(space)
        if self.block_size == "unit":
            return self._alone(calibration, groups, names)
        shapes = {tensor.name: tensor.leaf.shape for tensor in space}
        owned = {group.name: _owned(group, names, shapes) for group in groups}
        fisher = EmpiricalFisher(block_size=self.block_size).fit(calibration)
        fisher.damping = fisher.mean_square() if self.damping == "auto" else float(self.damping)
        fisher.damping = max(fisher.damping, torch.finfo(torch.float64).tiny)
        self._fisher = fisher
        weights = fisher.remaining.gather(space.values()).to(float64_device(calibration.device))
        room = calibration.memory.chunk_bytes
        costs = {
            group.name: weights.new_zeros(group.units, dtype=torch.float64) for group in groups
        }
        for start, gradients in _single_blocks(fisher):
            own = weights[start : start + gradients.shape[1]]
            block = JointCosts(gradients, fisher.damping, own, room)
            for name, pairs in owned.items():
                units, index, valid = pairs.between(start, start + len(own)).padded(own.device)
                costs[name].index_add_(0, units, block.of(index, valid))
        return costs

    def update(
        self, model: nn.Module, groups: Sequence[UnitGroup], kept: Kept
    ) -> dict[str, Tensor] | None:
        """Return what stays after the joint update, block by block.

        Args:
            model: The model before the cut.
            groups: All groups.
            kept: The units that stay.
        """
        fisher, self._fisher = self._fisher, None
        calibration = None if fisher is None else fisher.calibration
        if fisher is None or calibration is None or self.update_scale == 0:
            return None
        values = calibration.space.values()
        plan = plan_of(model, groups, kept)
        whole = {name: torch.ones_like(value, dtype=torch.bool) for name, value in values.items()}
        stays = {name: plan.expand(name, plan.cut(name, mask)) for name, mask in whole.items()}
        weights = wide(fisher.remaining.gather(values).to(calibration.device))
        keep = fisher.remaining.gather(stays).to(weights.device)
        move = _compensation(fisher, weights, keep)
        scales = _SCALES if isinstance(self.update_scale, str) else (float(self.update_scale),)
        choices = [fisher.remaining.scatter((weights + scale * move) * keep) for scale in scales]
        if len(choices) == 1:
            return choices[0]
        return min(choices, key=lambda choice: calibration.held_out_loss(choice).value)

    def _alone(
        self,
        calibration: Calibration,
        groups: Sequence[UnitGroup],
        names: Mapping[str, str],
    ) -> dict[str, Tensor]:
        """``½ w_gᵀF_gg w_g = ½ (1/N) Σ_n (g_n·w_g)² + ½ λ|w_g|²``, a few gradients at a time."""
        device = float64_device(calibration.device)
        weights = {
            name: value.to(device, calibration.dtype)
            for name, value in calibration.space.values().items()
        }
        places = [_places(group, names, device) for group in groups]
        changes = [torch.zeros(group.units, dtype=torch.float64, device=device) for group in groups]
        squares = 0.0
        for rows in calibration.gradients():
            squares += float(torch.linalg.vector_norm(rows)) ** 2
            products = _products(rows, weights)
            for index, place in enumerate(places):
                changes[index] += _sums(products, place).square().sum(0)
        count, entries = calibration.num_gradients, sum(w.numel() for w in weights.values())
        damping = squares / (count * entries) if self.damping == "auto" else float(self.damping)
        norms = {name: value.square().unsqueeze(0) for name, value in weights.items()}
        return {
            group.name: 0.5 * (change / count + damping * _sums(norms, place)[0])
            for group, change, place in zip(groups, changes, places, strict=True)
        }


class _Pairs(NamedTuple):
    """Which unit owns which position of a vector, sorted by position, no pair twice."""

    entries: Tensor
    units: Tensor

    def between(self, start: int, stop: int) -> _Pairs:
        """The pairs with a position in a range, counted from its start."""
        low, high = torch.searchsorted(self.entries, torch.tensor([start, stop])).tolist()
        return _Pairs(self.entries[low:high] - start, self.units[low:high])

    def padded(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The units, and the positions of each with what of them is real, ``[units, longest]``."""
        inside, counts = self.units.unique(return_counts=True)
        longest = int(counts.max()) if len(counts) else 0
        valid = torch.arange(longest) < counts[:, None]
        index = torch.zeros(valid.shape, dtype=torch.long)
        index[valid] = self.entries[self.units.argsort(stable=True)]
        return inside.to(device), index.to(device), valid.to(device)


def _owned(group: UnitGroup, names: Mapping[str, str], shapes: Mapping[str, torch.Size]) -> _Pairs:
    """Positions in the vector of all tensors; an entry in a unit's row and column counts once."""
    offsets, end = {}, 0
    for name, shape in shapes.items():
        offsets[name], end = end, end + shape.numel()
    parts = []
    for piece in group.slices:
        if piece.name in names:
            own = names[piece.name]
            flat = torch.arange(shapes[own].numel()).reshape(shapes[own]) + offsets[own]
            lines = flat.movedim(piece.dim, 0)[piece.positions.cpu()]
            parts.append(lines.reshape(group.units, -1))
    entries = torch.cat(parts, dim=1)
    keys = (entries * group.units + torch.arange(group.units)[:, None]).unique()
    return _Pairs(keys // group.units, keys % group.units)


def _single_blocks(fisher: EmpiricalFisher) -> Iterator[tuple[int, Tensor]]:
    for where, stacked in fisher.whole_blocks():
        for number, gradients in enumerate(stacked):
            yield where.start + number * stacked.shape[-1], gradients


def _compensation(fisher: EmpiricalFisher, weights: Tensor, keep: Tensor) -> Tensor:
    """``δ`` of the joint update; zero in blocks that lose nothing or everything."""
    move = fisher.directions(weights, keep).compensation
    for start, stop in fisher.blocks:
        if bool(keep[start:stop].all()) or not bool(keep[start:stop].any()):
            move[start:stop] = 0.0
    return move


def _places(
    group: UnitGroup, names: Mapping[str, str], device: torch.device
) -> dict[str, list[tuple[int, Tensor]]]:
    """Dimensions and positions that the units own, by the name of the parameter."""
    places: dict[str, list[tuple[int, Tensor]]] = {}
    for piece in group.slices:
        if piece.name in names:
            places.setdefault(names[piece.name], []).append((piece.dim, piece.positions.to(device)))
    return places


def _products(rows: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``g ⊙ w`` by the name of the parameter, ``[rows, *shape]``; writes over the gradients."""
    parts = rows.split([value.numel() for value in weights.values()], dim=1)
    return {
        name: part.unflatten(1, value.shape).mul_(value)
        for (name, value), part in zip(weights.items(), parts, strict=True)
    }


def _sums(values: Mapping[str, Tensor], places: Mapping[str, list[tuple[int, Tensor]]]) -> Tensor:
    result = [sums_of_units(values[name], place) for name, place in places.items()]
    return torch.stack(result).sum(0)
