"""The damped empirical Fisher of the live weights, as blocks of per-mini-batch gradients."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchprune_bayes._checks import check_count, check_positive
from torchprune_bayes._numerics.fisher_blocks import (
    InverseFisher,
    SampleSpace,
    in_sample_space,
    invert,
)
from torchprune_bayes._numerics.live_vector import LiveVector
from torchprune_bayes._numerics.partition import group_by_budget, partition, runs_of_equal_size
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import AlignmentError, ArgumentError, CalibrationError
from torchprune_bayes.types import Masks

_MIB = 2**20


class EmpiricalFisher:
    """``F = λI + (1/N) Σ_n g_n g_nᵀ`` of the live weights, block by block.

    Nothing of size ``B x B`` or ``D x D`` is stored. If the gradients fit into a quarter of the
    calibration's memory budget they are kept; otherwise every sweep streams them again, a group of
    blocks at a time. Sweeps are exact: streamed and kept gradients give the same numbers.

    Legend: ``D`` live entries, ``N`` gradients, ``B`` entries of a block.

    Args:
        block_size: ``"full"`` (one block over all tensors), ``"tensor"`` (one per tensor), an int
            (contiguous blocks of at most that many entries), or ``"auto"``: ``"full"`` where the
            gradients are kept, else the largest blocks that a quarter of the budget holds.
        across_tensors: Whether blocks of a given size may span several tensors.
        active_only: Whether blocks are cut from the live entries alone (the papers' dynamic
            variant); otherwise masked entries take their place with gradients of zero.
        centred: Whether the mean gradient is subtracted, ``F − ḡḡᵀ``.
        damping: ``λ``.

    Attributes:
        calibration: Where the gradients came from; ``None`` after :meth:`load`.
        live: Order of the entries, a ``LiveVector``; vectors below are ``[D]`` in this order.
        count: ``N``.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> data = [(torch.randn(16, 3), torch.randn(16, 2))]
        >>> calibration = Calibration(model, data, torch.nn.functional.mse_loss)
        >>> fisher = EmpiricalFisher(damping=0.1).fit(calibration)
        >>> v = torch.randn(6, dtype=torch.float64)
        >>> torch.allclose(fisher.multiply(fisher.solve(v)), v)
        True
    """

    def __init__(
        self,
        *,
        block_size: int | str = "auto",
        across_tensors: bool = False,
        active_only: bool = True,
        centred: bool = False,
        damping: float = 1e-3,
    ) -> None:
        _check_block_size(block_size)
        check_positive("damping", damping)
        self.block_size = block_size
        self.across_tensors = across_tensors
        self.active_only = active_only
        self.centred = centred
        self.damping = damping
        self._gradients: Tensor | None = None
        self._spaces: dict[int, SampleSpace] = {}
        self.calibration: Calibration | None = None
        self._weights: Mapping[str, Tensor] | None = None

    def fit(
        self,
        calibration: Calibration,
        weights: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> EmpiricalFisher:
        """Take gradients at ``weights`` of the entries that ``masks`` keep; returns itself.

        Args:
            calibration: Where gradients come from.
            weights: Values by qualified name; default the model's own.
            masks: Live entries; default those of the model.

        Cost: one pass over the calibration data; ``4 N D`` bytes if that is in the budget.
        """
        masks = calibration.space.masks() if masks is None else masks
        everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
        self.live = LiveVector(masks if self.active_only else everything)
        self._alive = None if self.active_only else self.live.gather(masks)
        if not self.live.numel:
            raise ArgumentError("Expected live weights, got none: everything is pruned already.")
        self.count = calibration.num_gradients
        self.calibration, self._weights, self._gradients = calibration, weights, None
        self._memory = calibration.memory_mb * _MIB
        self._spaces = {}
        bytes_needed = self.count * self.live.numel * calibration.dtype.itemsize
        if bytes_needed <= self._memory / 4:
            self._gradients = self._collect(0, self.live.numel)
        self.blocks = self._cut()
        return self

    def restricted(self, masks: Masks, damping: float) -> EmpiricalFisher:
        """The same Fisher of fewer entries, with another damping; no new gradients are taken.

        Args:
            masks: Entries to keep, among those that are live here.
            damping: ``λ``.
        """
        other = copy.copy(self)
        other.damping = damping
        if not self.active_only:
            other._alive = self.live.gather(masks)
            if self._gradients is not None:
                other._gradients = self._gradients * other._alive
            other._spaces = {}
            return other
        other.live = LiveVector(masks)
        if other.live.numel == self.live.numel:
            return other
        if self._gradients is not None:
            other._gradients = self._gradients[:, self.live.gather(masks)]
            other._spaces = {}
        other.blocks = other._cut()
        return other

    def with_blocks(self, block_size: int | str) -> EmpiricalFisher:
        """The same gradients cut into other blocks."""
        _check_block_size(block_size)
        other = copy.copy(self)
        other.block_size, other._spaces = block_size, {}
        other.blocks = other._cut()
        return other

    @property
    def kept_in_memory(self) -> bool:
        """Whether the gradients are held, rather than streamed at every sweep."""
        return self._gradients is not None

    def sweep(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield batches of equally large blocks of the gradients.

        Yields:
            The range of the live vector, and its gradients ``[blocks, N, B]``.
        """
        item = self._item_size()
        per_group = int(self._memory / 2 / (item * self.count))
        for group in group_by_budget(self.blocks, max(per_group, 1)):
            low, high = group[0][0], group[-1][1]
            rows = self._rows(low, high)
            for start, number, size in runs_of_equal_size(group):
                for first in range(0, number, self._batch(size)):
                    taken = min(self._batch(size), number - first)
                    begin = start + first * size
                    columns = rows[:, begin - low : begin - low + taken * size]
                    stacked = columns.unflatten(1, (taken, size)).transpose(0, 1)
                    yield slice(begin, begin + taken * size), stacked

    def inverses(self) -> Iterator[tuple[slice, InverseFisher]]:
        """Yield batches of inverted blocks with their range of the live vector."""
        for where, gradients in self.sweep():
            space = self._sample_space(where, gradients)
            if space is None:
                yield where, invert(gradients, self.damping)
            else:
                yield where, space.inverse(gradients, self.damping)

    def inner(self, where: slice, gradients: Tensor) -> Tensor | None:
        """``GGᵀ`` of a batch of blocks from :meth:`sweep`, kept for the sweeps to come.

        ``None`` where it would not be used, or where all would take over an eighth of the budget.
        """
        space = self._sample_space(where, gradients)
        return None if space is None else space.inner

    def _sample_space(self, where: slice, gradients: Tensor) -> SampleSpace | None:
        if where.start in self._spaces:
            return self._spaces[where.start]
        held = sum(space.inner.nbytes for space in self._spaces.values())
        needed = 8 * len(gradients) * self.count**2
        if (
            self._gradients is None
            or held + needed > self._memory / 8
            or not in_sample_space(gradients)
        ):
            return None
        return self._spaces.setdefault(where.start, SampleSpace(gradients))

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of ``F⁻¹``, float64 ``[D]``. Cost: ``N²D`` (``N < B``) or ``(N + B) B D``."""
        return torch.cat([inverse.inverse_diagonal().flatten() for _, inverse in self.inverses()])

    def solve(self, vector: Tensor) -> Tensor:
        """``F⁻¹ v`` for ``v`` of shape ``[D]``, float64."""
        return torch.cat(
            [
                inverse.solve(vector[where].unflatten(0, inverse.shape)).flatten()
                for where, inverse in self.inverses()
            ]
        )

    def columns(self, indices: Tensor) -> Tensor:
        """Columns ``F⁻¹[:, i]`` for indices ``[k]`` into the live vector, float64 ``[D, k]``."""
        found = torch.zeros(self.live.numel, len(indices), dtype=torch.float64)
        found = found.to(indices.device)
        for where, inverse in self.inverses():
            blocks, _, size = inverse.gradients.shape
            for block in range(blocks):
                start = where.start + block * size
                here = ((indices >= start) & (indices < start + size)).nonzero().squeeze(1)
                if len(here):
                    local = (indices[here] - start).expand(blocks, -1)
                    found[start : start + size, here] = inverse.columns(local)[block]
        return found

    def multiply(self, vector: Tensor) -> Tensor:
        """``F v`` for ``v`` of shape ``[D]``, float64."""
        parts = []
        for where, gradients in self.sweep():
            part = vector[where].double().unflatten(0, gradients.shape[::2]).unsqueeze(-1)
            wide = gradients.double()
            parts.append((wide.mT @ (wide @ part)).squeeze(-1).flatten() / self.count)
        return torch.cat(parts) + self.damping * vector.double()

    def quadratic(self, vector: Tensor) -> float:
        """``½ vᵀ F v`` without the damping, the predicted rise of the loss for a step ``v``."""
        total = 0.0
        for where, gradients in self.sweep():
            part = vector[where].double().unflatten(0, gradients.shape[::2]).unsqueeze(-1)
            total += float((gradients.double() @ part).square().sum()) / (2 * self.count)
        return total

    def mean_square(self) -> float:
        """Mean over the live entries of ``(1/N) Σ g²``, the natural unit of the damping."""
        total = 0.0
        for where, gradients in self.sweep():
            inner = self.inner(where, gradients)  # its trace is the sum of squares
            squares = gradients.square() if inner is None else inner.diagonal(dim1=-2, dim2=-1)
            total += float(squares.sum(dtype=torch.float64))
        return total / (self.count * self.live.numel)

    def merge(self, other: EmpiricalFisher) -> EmpiricalFisher:
        """Join the gradients of another fit of the same weights, such as another rank's.

        Raises:
            CalibrationError: If one of the two streams its gradients.
            AlignmentError: If the two do not have the same live entries.
        """
        if self._gradients is None or other._gradients is None:
            raise CalibrationError(
                "Expected gradients kept in memory to merge, got streamed ones: raise memory_mb."
            )
        if list(self.live.masks) != list(other.live.masks) or any(
            not torch.equal(mask, other.live.masks[name]) for name, mask in self.live.masks.items()
        ):
            raise AlignmentError("Expected the same live entries in both Fishers, got others.")
        self._gradients = torch.cat([self._gradients, other._gradients])
        self._spaces = {}
        self.count += other.count
        return self

    def save(self, path: str | Path) -> None:
        """Write gradients, masks and settings as one safetensors file.

        Raises:
            CalibrationError: If the gradients are streamed, not kept.
        """
        if self._gradients is None:
            raise CalibrationError(
                "Expected gradients kept in memory to save, got streamed ones: raise memory_mb."
            )
        tensors = {f"mask:{name}": mask for name, mask in self.live.masks.items()}
        tensors["gradients"] = self._gradients.contiguous()
        settings = {
            "block_size": self.block_size,
            "across_tensors": self.across_tensors,
            "active_only": self.active_only,
            "centred": self.centred,
            "damping": self.damping,
        }
        order = json.dumps(list(self.live.masks))
        save_file(tensors, path, {"settings": json.dumps(settings), "order": order})

    @classmethod
    def load(cls, path: str | Path) -> EmpiricalFisher:
        """Read what :meth:`save` wrote; needs neither model nor data."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            fisher = cls(**json.loads(metadata["settings"]))
            masks = {
                name: file.get_tensor(f"mask:{name}") for name in json.loads(metadata["order"])
            }
            gradients = file.get_tensor("gradients")
        fisher.live = LiveVector(masks)
        fisher._alive = None
        fisher._gradients = gradients
        fisher.count = len(gradients)
        fisher._memory = 4 * gradients.nbytes
        fisher.blocks = fisher._cut()
        return fisher

    def _cut(self) -> list[tuple[int, int]]:
        size = self.block_size
        if size == "auto":
            entries = max(int(self._memory / 4 / (self._item_size() * self.count)), 1)
            size = "full" if self.kept_in_memory else entries
        return partition(self.live.sizes, size, across_tensors=self.across_tensors)

    def _rows(self, start: int, stop: int) -> Tensor:
        if self._gradients is None:
            return self._collect(start, stop)
        return self._gradients[:, start:stop]

    def _collect(self, start: int, stop: int) -> Tensor:
        assert self.calibration is not None
        rows: Tensor | None = None
        done = 0
        for part in self.calibration.gradients(self._weights, self.live, (start, stop)):
            if rows is None:
                rows = part.new_empty(self.count, stop - start)
            rows[done : done + len(part)] = part
            done += len(part)
        assert rows is not None
        if self._alive is not None:
            rows *= self._alive[start:stop]
        return rows.sub_(rows.mean(0)) if self.centred else rows

    def _item_size(self) -> int:
        source = self._gradients if self._gradients is not None else self.calibration
        assert source is not None
        return source.dtype.itemsize

    def _batch(self, size: int) -> int:
        # Float64 copies of one batch of blocks: the gradients and a few matrices of the factor.
        per_block = 8 * (2 * self.count * size + 4 * min(self.count, size) ** 2)
        return max(int(self._memory / 4 / per_block), 1)


def _check_block_size(block_size: int | str) -> None:
    if isinstance(block_size, str):
        if block_size not in ("auto", "full", "tensor"):
            raise ArgumentError(
                "Expected `block_size` to be an int, 'auto', 'full' or 'tensor', "
                f"got {block_size!r}."
            )
    else:
        check_count("block_size", block_size)
