"""The damped empirical Fisher of the remaining weights, as blocks of per-mini-batch gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchprune_bayes._checks import check_count, check_positive
from torchprune_bayes._files import reading
from torchprune_bayes._numerics.fisher_blocks import SampleSpace
from torchprune_bayes._numerics.partition import blocks_of_kept, partition
from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature._fisher_files import StoredFisher
from torchprune_bayes.curvature.blocked_gradients import SharedProducts
from torchprune_bayes.curvature.damped_fisher import SAMPLED_BLOCKS, DampedFisher
from torchprune_bayes.curvature.gradient_store import GradientStore, Placement
from torchprune_bayes.curvature.group_layout import GroupLayout
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.memory import MemoryBudget
from torchprune_bayes.types import Masks


class EmpiricalFisher(DampedFisher):
    """``F = λI + (1/N) Σ_n g_n g_nᵀ`` of the remaining weights, block by block.

    The gradients are computed in one pass over the data and stored where there is room: on the
    device, in the CPU's memory, or in a scratch file that is deleted with the object. Nothing of
    size ``B x B`` or ``D x D`` is stored, and results do not depend on where gradients are stored.

    Legend: ``D`` remaining entries, ``N`` gradients, ``B`` entries of a block.

    Args:
        block_size: ``"full"`` (one block over all tensors), ``"tensor"`` (one per tensor), an int
            (contiguous blocks of at most that many entries), or ``"auto"``, the same as ``"full"``.
        across_tensors: Whether blocks of a given size may span several tensors.
        active_only: Whether blocks are cut from the remaining entries only (the papers' dynamic
            variant); otherwise pruned entries are included with zero gradients. They are cut where
            gradients are taken, and lose entries from then on.
        centred: Whether the mean gradient is subtracted, ``F − ḡḡᵀ``.
        damping: ``λ``.
        layout: Another order of the entries, for patterns; then ``active_only`` is false.

    Attributes:
        calibration: Where the gradients came from; ``None`` after :meth:`load`.
        remaining: Order of the entries, a ``RemainingVector``, and of the vectors ``[D]`` below.
        count: ``N``.
        blocks: Ranges ``(start, stop)`` of the blocks in this order.

    Example:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> data = [(torch.randn(16, 3), torch.randn(16, 2))]
        >>> calibration = Calibration(model, data, torch.nn.functional.mse_loss)
        >>> fisher = EmpiricalFisher(damping=0.1).fit(calibration)
        >>> v = torch.randn(6, dtype=torch.float64)
        >>> torch.allclose(fisher.multiply(fisher.solve(v)), v, atol=1e-5)
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
        layout: GroupLayout | None = None,
    ) -> None:
        _check_block_size(block_size)
        check_positive("damping", damping)
        self.block_size = block_size
        self.across_tensors = across_tensors
        self.active_only = active_only and layout is None
        self.centred = centred
        self.damping = damping
        self.layout = layout
        self.calibration: Calibration | None = None
        self.products = SharedProducts()

    def fit(
        self,
        calibration: Calibration,
        weights: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> EmpiricalFisher:
        """Compute gradients at ``weights`` of the entries that ``masks`` keep; returns itself.

        Args:
            calibration: Where gradients come from.
            weights: Values by qualified name; default the model's own.
            masks: Remaining entries; default those of the model.

        Raises:
            ArgumentError: If no entries remain.
            CalibrationError: If the data gave no usable gradients, or there is no room for them.

        Cost: one pass over the calibration data; ``4 N D`` bytes on the device, in memory or in a
        file, as the calibration's ``offload`` says.
        """
        masks = calibration.space.masks() if masks is None else masks
        everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
        self.remaining = RemainingVector(masks if self.active_only else everything)
        if not self.remaining.numel:
            raise ArgumentError("Expected remaining weights, got none: everything is pruned.")
        self.count = calibration.num_gradients
        self.calibration, self.budget = calibration, calibration.memory
        self.products = SharedProducts()
        self.store = GradientStore.filled(
            lambda out: calibration.gradients(weights, self.remaining, out=out),
            (self.count, self.remaining.numel),
            _placement(calibration),
            float64_device(calibration.device),
            calibration.dtype,
        )
        if self.centred:
            self.store.subtract_mean()
        if self.layout is not None:
            self.remaining, self.store = self.layout.reordered(self.remaining, self.store)
        if not self.active_only:
            self.store = self.store.with_active(self._active(masks))
        self.blocks = self._cut()
        return self

    def restricted(self, masks: Masks, damping: float) -> EmpiricalFisher:
        """The same Fisher of fewer entries, with another damping.

        Its blocks are those of this one with the entries that are left in them.

        Args:
            masks: Entries to keep, among those that remain here.
            damping: ``λ``.
        """
        other = self.damped(damping)
        if not self.active_only:
            other.store = self.store.with_active(self._active(masks))
            other.products = SharedProducts()
            return other
        keep = self.remaining.gather(masks)
        other.remaining = RemainingVector(masks)
        if other.remaining.numel == self.remaining.numel:
            return other
        other.known_diagonal = self.products.diagonal_of(keep, damping)
        room = 0 if other.known_diagonal is not None else self.budget.copy_bytes
        other.store = self.store.restricted(keep, room)
        other.blocks = blocks_of_kept(self.runs, keep)
        other.products = SharedProducts()
        if len(other.blocks) == 1 and (inner := self.products.inner_of(keep)) is not None:
            other.products.spaces[0] = SampleSpace(inner)
        return other

    def damped(self, damping: float) -> EmpiricalFisher:
        """The same Fisher with another ``λ``."""
        other = copy.copy(self)
        other.damping, other.known_diagonal = damping, None
        return other

    def of_every_second_gradient(self) -> EmpiricalFisher:
        """The Fisher of half of the gradients, in the same blocks."""
        other = self.damped(self.damping)
        other.store, other.count = self.store.every_second(), -(-self.count // 2)
        other.products = SharedProducts(runs=self.runs)
        return other

    def to(self, device: torch.device) -> EmpiricalFisher:
        """The same Fisher, computing on another device, or on the CPU without float64."""
        device = float64_device(device)
        if device == self.store.device:
            return self
        other = copy.copy(self)
        other.store, other.products = self.store.to(device), SharedProducts()
        return other

    def with_blocks(self, block_size: int | str) -> EmpiricalFisher:
        """The same gradients cut into other blocks."""
        _check_block_size(block_size)
        other = copy.copy(self)
        other.block_size = block_size
        other.blocks = other._cut()
        if other.blocks != self.blocks:
            other.products, other.known_diagonal = SharedProducts(), None
        return other

    def few_blocks(self, damping: float) -> EmpiricalFisher:
        """The Fisher of up to 16 of its blocks, evenly spread, with another damping.

        In the order of a pattern, where no entry may be left out, it is the whole.
        """
        stride = -(-len(self.blocks) // SAMPLED_BLOCKS)
        if stride == 1 or not self.active_only:
            return self.damped(damping)
        chosen = torch.zeros(self.remaining.numel, dtype=torch.bool, device=self.store.device)
        for start, stop in self.blocks[::stride]:
            chosen[start:stop] = True
        return self.restricted(self.remaining.scatter(chosen), damping)

    def with_blocks_in_memory(self) -> EmpiricalFisher:
        """The same, cut further where the gradients of a block are more than the budget holds.

        For searches that read all gradients of a block repeatedly.
        """
        room = max(self.budget.gradients_bytes // (self.store.dtype.itemsize * self.count), 1)
        largest = max(stop - start for start, stop in self.blocks)
        return self if largest <= room or self.in_place else self.with_blocks(room)

    def merge(self, other: EmpiricalFisher) -> EmpiricalFisher:
        """Merge the gradients of another fit of the same weights, such as another rank's.

        Raises:
            AlignmentError: If the two do not have the same remaining entries.
        """
        if list(self.remaining.masks) != list(other.remaining.masks) or any(
            not torch.equal(mask, other.remaining.masks[name].to(mask.device))
            for name, mask in self.remaining.masks.items()
        ):
            raise AlignmentError("Expected the same remaining entries in both Fishers, got others.")
        rows = torch.cat([self.store.whole(), other.store.whole().to(self.store.device)])
        self.store, self.products = GradientStore(rows, self.store.device), SharedProducts()
        self.count += other.count
        return self

    def save(self, path: str | Path) -> None:
        """Write gradients, masks and settings as one safetensors file.

        Raises:
            ArgumentError: If the file cannot be written, or the order is that of a pattern.
        """
        if self.layout is not None:
            raise ArgumentError(
                "Expected a Fisher in the order of its tensors to save, got one "
                "in the order of a pattern: fit one without `layout`."
            )
        settings = {
            "block_size": self.block_size,
            "across_tensors": self.across_tensors,
            "active_only": self.active_only,
            "centred": self.centred,
            "damping": self.damping,
        }
        StoredFisher(self.store.whole(), self.remaining.masks, settings).save(path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> EmpiricalFisher:
        """Read what :meth:`save` wrote; needs neither model nor data.

        Args:
            path: The file.
            device: Where the gradients are wanted, that of the model.

        Raises:
            ArgumentError: If the file is missing, damaged or of another kind.
        """
        stored = StoredFisher.load(path, float64_device(device))
        with reading(path, "an empirical Fisher"):
            fisher = cls(**stored.settings)
        fisher.remaining, rows = RemainingVector(stored.masks), stored.rows
        fisher.store, fisher.count = GradientStore(rows, rows.device), len(rows)
        fisher.budget = MemoryBudget(max(8 * rows.nbytes, 2**24))
        fisher.blocks = fisher._cut()
        return fisher

    def _active(self, masks: Masks) -> Tensor | None:
        active = self.remaining.gather(masks).to(self.store.device)
        return None if bool(active.all()) else active

    def _cut(self) -> list[tuple[int, int]]:
        size = "full" if self.block_size == "auto" else self.block_size
        blocks = partition(self.remaining.sizes, size, across_tensors=self.across_tensors)
        whole = None if self.layout is None else self.layout.block_size(blocks)
        if whole is None:
            return blocks
        return partition(self.remaining.sizes, whole, across_tensors=self.across_tensors)


def _placement(calibration: Calibration) -> Placement:
    dtype = calibration.gradient_dtype or calibration.dtype
    return Placement(calibration.offload, dtype, calibration.memory.gradients_bytes)


def _check_block_size(block_size: int | str) -> None:
    if isinstance(block_size, str):
        if block_size not in ("auto", "full", "tensor"):
            raise ArgumentError(
                "Expected `block_size` to be 'auto', 'full', 'tensor' or an int, "
                f"got {block_size!r}."
            )
    else:
        check_count("block_size", block_size)
