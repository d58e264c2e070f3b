"""Storage for the gradients of one pass over the data: on the device, in memory or in a file."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchprune_bayes._numerics.gradient_tiles import columns_of
from torchprune_bayes.errors import CalibrationError


@dataclass(frozen=True)
class Placement:
    """Where gradients are stored, and in which dtype.

    Args:
        offload: ``"device"``, the computing device; ``"host"``, the CPU's memory; a folder, a
            scratch file in it; or ``"auto"``: the first of the three with enough room, with the
            system's folder for temporary files.
        dtype: ``float32``, or ``bfloat16``, which halves the memory and rounds every gradient to
            eight bits; sums over gradients are exact in the same way with both.
        room_bytes: Bytes that may be stored in memory with ``"auto"``.
    """

    offload: str | Path
    dtype: torch.dtype
    room_bytes: int

    def new(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """Memory for gradients.

        Args:
            shape: ``(N, D)``.
            device: The computing device.

        Raises:
            CalibrationError: If the scratch folder has no room.
        """
        if isinstance(self.offload, Path):
            return _in_a_file(shape, self.dtype, self.offload)
        needed = shape[0] * shape[1] * self.dtype.itemsize
        if self.offload == "device" or (self.offload == "auto" and needed <= self.room_bytes):
            return torch.empty(shape, dtype=self.dtype, device=device)
        if self.offload == "host":
            return torch.empty(shape, dtype=self.dtype)
        return _in_a_file(shape, self.dtype, Path(tempfile.gettempdir()))


class GradientStore:
    """Gradients ``[N, D]``, of which a range of columns is read at a time.

    A store may be a view of another one, with some of its columns in another order.

    Args:
        rows: All gradients, ``[N, entries]``.
        device: Where columns are wanted.
        columns: Which entries the store has, in its order, int64 on the CPU; ``None`` for all.
        active: Boolean ``[D]`` on the device, ``False`` where gradients count as zero; ``None``
            for none.

    Example:
        >>> store = GradientStore(torch.arange(6.0).reshape(2, 3), torch.device("cpu"))
        >>> store.restricted(torch.tensor([True, False, True])).read(0, 2)
        tensor([[0., 2.],
                [3., 5.]])
    """

    def __init__(
        self,
        rows: Tensor,
        device: torch.device,
        columns: Tensor | None = None,
        active: Tensor | None = None,
    ) -> None:
        self.rows, self.device, self.columns, self.active = rows, device, columns, active

    @classmethod
    def filled(
        cls,
        chunks: Callable[[Tensor | None], Iterable[Tensor]],
        shape: tuple[int, int],
        placement: Placement,
        device: torch.device,
        made_in: torch.dtype = torch.float32,
    ) -> GradientStore:
        """Store the rows of one pass.

        Args:
            chunks: Makes ``[rows, D]``, ``N`` rows in all, and writes them to its argument, unless
                that is ``None``.
            shape: ``(N, D)``.
            placement: Where they are stored.
            device: Device on which they are made, and on which columns are read later.
            made_in: Dtype in which they are made.
        """
        rows, done = placement.new(shape, device), 0
        in_place = rows.device == device and rows.dtype == made_in
        for chunk in chunks(rows if in_place else None):
            if not in_place:
                rows[done : done + len(chunk)] = chunk
            done += len(chunk)
        return cls(rows, device)

    @property
    def count(self) -> int:
        """``N``."""
        return self.rows.shape[0]

    @property
    def entries(self) -> int:
        """``D``."""
        return self.rows.shape[1] if self.columns is None else len(self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which columns are read."""
        return torch.float64 if self.rows.dtype == torch.float64 else torch.float32

    def read(self, start: int, stop: int) -> Tensor:
        """The columns ``start:stop``, ``[N, stop − start]`` on the device; do not write to them."""
        if self.columns is None:
            part = self.rows[:, start:stop]
        else:
            chosen = self.columns[start:stop]
            low, high = int(chosen.min()), int(chosen.max()) + 1
            part = columns_of(self.rows[:, low:high], (chosen - low).to(self.rows.device))
        part = part.to(self.device, self.dtype)
        return part if self.active is None else part * self.active[start:stop]

    def to(self, device: torch.device) -> GradientStore:
        """The same stored gradients, read on another device."""
        active = None if self.active is None else self.active.to(device)
        return GradientStore(self.rows, device, self.columns, active)

    def restricted(self, keep: Tensor, copy_bytes: int = 0) -> GradientStore:
        """The columns that ``keep`` (boolean ``[D]``) names, in the same order.

        Args:
            keep: Boolean ``[D]``.
            copy_bytes: Largest size of a copy of them; above it the result is a view.
        """
        chosen = keep.nonzero().squeeze(1).cpu()
        columns = chosen if self.columns is None else self.columns[chosen]
        active = None if self.active is None else self.active[keep.to(self.active.device)]
        if self.count * len(columns) * self.rows.dtype.itemsize <= copy_bytes:
            rows = columns_of(self.rows, columns.to(self.rows.device))
            return GradientStore(rows, self.device, None, active)
        return GradientStore(self.rows, self.device, columns, active)

    def every_second(self) -> GradientStore:
        """A view of every second gradient."""
        return GradientStore(self.rows[::2], self.device, self.columns, self.active)

    def reordered(self, order: Tensor) -> GradientStore:
        """A view in another order of the columns, int64 ``[D]``."""
        order = order.cpu()
        columns = order if self.columns is None else self.columns[order]
        active = None if self.active is None else self.active[order.to(self.active.device)]
        return GradientStore(self.rows, self.device, columns, active)

    def with_active(self, active: Tensor | None) -> GradientStore:
        """The same columns, of which those that are not ``active`` count as zero."""
        return GradientStore(self.rows, self.device, self.columns, active)

    def subtract_mean(self) -> None:
        """Subtract the mean gradient from all gradients, in place."""
        for start in range(0, self.rows.shape[1], 2**16):
            part = self.rows[:, start : start + 2**16]
            part -= part.mean(0)

    def whole(self) -> Tensor:
        """All columns in one tensor of the store's dtype, ``[N, D]``."""
        return self.read(0, self.entries)


def _in_a_file(shape: tuple[int, int], dtype: torch.dtype, folder: Path) -> Tensor:
    needed = shape[0] * shape[1] * dtype.itemsize
    try:
        descriptor, name = tempfile.mkstemp(prefix="gradients-", dir=folder)
    except OSError as error:
        raise CalibrationError(
            f"Expected a folder to write gradients to, got {str(folder)!r} ({error.strerror}): "
            "name another one with `offload=`."
        ) from error
    try:
        _reserve(descriptor, needed)
        rows = torch.from_file(name, shared=True, size=shape[0] * shape[1], dtype=dtype)
    except (OSError, RuntimeError) as error:
        Path(name).unlink(missing_ok=True)
        raise CalibrationError(
            f"Expected room for {needed / 2**20:.0f} MiB of gradients in {str(folder)!r}, got too "
            "little: lower num_samples, raise memory_mb, or name another folder with `offload=`."
        ) from error
    finally:
        os.close(descriptor)
    rows = rows.view(shape)
    try:
        Path(name).unlink()  # the mapping stays; the room is free as soon as the tensor is gone
    except OSError:  # a system that does not remove open files
        weakref.finalize(rows, Path(name).unlink, missing_ok=True)
    return rows


def _reserve(descriptor: int, size: int) -> None:
    """Make a file with allocated space: writing to a full disk would kill the process."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
