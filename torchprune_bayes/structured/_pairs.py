"""Removing dimensions of queries and keys, with compensation of their products.

In plain words: in a product ``q·k`` each side reads the other. When dimensions ``Z`` are removed
and ``K`` remain, one side (say the keys) is predicted from its remaining dimensions, ``k_Z ≈ B
k_K``, and the other absorbs this: ``q_K + Bᵀ q_Z``, which is linear, so that the layer that
produces it is changed. This is the least squares of :func:`~torchprune_bayes.structured.repair` for
units that a product reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.input_moments import Fit, Moments, least_squares
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.structured._layer_inputs import as_matrix, as_weight, is_readable
from torchprune_bayes.structured._reader import Reader
from torchprune_bayes.structured._readers import Tensors, rows_that_go, without_rows
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.wiring.groups import HeadPart


class Side(NamedTuple):
    """A layer that produces queries or keys: their positions along its outputs, ``[d, heads, n]``.

    There are several per head if a fused layer produces both, or queries share a key.
    """

    module: nn.Module
    positions: Tensor


class Pairs:
    """Queries and keys of groups.

    Args:
        model: The model.
        groups: Its groups; those without queries and keys are skipped.

    Attributes:
        readers: Collect the moments of the inputs of the predicting layers.
        fits: Fits of the last predictions, by the name of the layer that absorbs them.
    """

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        self._model = model
        self._sides = {group.name: _sides(model, group) for group in groups}
        names = {module: path for path, module in model.named_modules()}
        self.readers: dict[nn.Module, Reader] = {}
        for pairs in self._sides.values():
            for given, _ in pairs:
                path = names[given.module]
                inputs = 1 - kind_of(given.module).output_dim
                reader = Reader(f"{path}.weight", path, given.module, inputs)
                self.readers.setdefault(given.module, reader)
        self._names = names
        self.fits: dict[str, list[Fit]] = {}

    def without(
        self, groups: Sequence[UnitGroup], gone: Mapping[str, Tensor], damping: float | str
    ) -> Tensors:
        """Tensors of layers without the removed dimensions; the readers must have seen the inputs.

        Args:
            groups: Groups of the model.
            gone: Units that go, by the name of their group.
            damping: As for :func:`~torchprune_bayes._numerics.input_moments.least_squares`.
        """
        result: Tensors = {}
        for group in groups:
            for given, taking in self._sides.get(group.name, ()) if group.name in gone else ():
                keep = torch.ones(group.units, dtype=torch.bool)
                keep[gone[group.name].cpu()] = False
                own = result.get(taking.module, {})
                result[taking.module] = own | self._taken_over(given, taking, keep, damping, own)
        for module, rows in rows_that_go(self._model, groups, gone).items():
            result[module] = without_rows(module, rows, result.get(module, {}))
        return result

    def _taken_over(
        self,
        given: Side,
        taking: Side,
        keep: Tensor,
        damping: float | str,
        tensors: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """A layer whose queries, or keys, absorb what the other side loses."""
        rows = self.readers[given.module].rows
        if rows is None:  # the layer is not called
            return {}
        halves = rows.both()
        weight = tensors.get("weight", taking.module._parameters["weight"])
        bias = tensors.get("bias", taking.module._parameters.get("bias"))
        assert weight is not None
        matrix = wide(as_matrix(taking.module, weight.detach())).clone()
        shift = None if bias is None else wide(bias.detach()).clone()
        fits = self.fits.setdefault(self._names[taking.module], [])
        eye = torch.eye(len(keep), dtype=torch.float64, device=matrix.device)
        keep = keep.to(eye.device)
        moments = zip(*(_of_outputs(given, half) for half in halves), strict=True)
        for head, (one, other) in zip(taking.positions.unbind(1), moments, strict=True):
            fit = least_squares(eye, keep, (one, other), intercept=False, damping=damping)
            fits.append(fit)
            for rows in head.T:
                matrix[rows] = fit.weight.T @ matrix[rows]
                if shift is not None:
                    shift[rows] = fit.weight.T @ shift[rows]
        result = {"weight": as_weight(taking.module, matrix, weight)}
        if bias is not None and shift is not None:
            result["bias"] = shift.to(bias)
        return result


def _of_outputs(side: Side, inputs: Moments) -> list[Moments]:
    """Moments of the queries or keys of each head, from those of the layer's inputs."""
    weight, bias = side.module._parameters["weight"], side.module._parameters.get("bias")
    assert weight is not None
    matrix = wide(as_matrix(side.module, weight.detach()))
    shift = matrix.new_zeros(len(matrix)) if bias is None else wide(bias.detach())
    result = []
    for head in side.positions.unbind(1):
        moments = Moments.zeros(len(head), matrix.device)
        for rows in head.T:
            own, moved = matrix[rows], shift[rows]
            total = own @ inputs.total
            products = own @ inputs.products @ own.T + torch.outer(total, moved)
            total = total + inputs.count * moved
            products = products + torch.outer(moved, total)
            moments = moments + Moments(inputs.count, total, products)
        result.append(moments)
    return result


def _sides(model: nn.Module, group: UnitGroup) -> list[tuple[Side, Side]]:
    """The predicted side and the absorbing side of each product of a group."""
    pairs = (_pair(model, group, part) for part in group.parts)
    return [pair for pair in pairs if pair is not None]


def _pair(model: nn.Module, group: UnitGroup, part: HeadPart) -> tuple[Side, Side] | None:
    """Both sides of a product; ``None`` if a layer reads them, or they are produced otherwise."""
    pieces = [group.slices[place] for place in part.slices]
    sides = []
    for piece in pieces:
        path, _, key = piece.name.rpartition(".")
        module = model.get_submodule(path)
        if piece.role != "producer" or key not in ("weight", "bias") or not is_readable(module):
            return None
        if key == "weight":
            positions = piece.positions.cpu().reshape(group.units, part.heads, -1)
            sides.append(Side(module, positions))
    if len(sides) == 1 and sides[0].positions.shape[2] == 2:  # one layer makes both
        module, positions = sides[0]
        return Side(module, positions[:, :, :1]), Side(module, positions[:, :, 1:])
    if len(sides) != 2:
        return None
    sides.sort(key=lambda side: side.positions.shape[2])
    return sides[0], sides[1]
