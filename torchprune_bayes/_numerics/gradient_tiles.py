"""Products with gradients ``[blocks, N, B]`` that may not fit into memory at once.

In plain words: every product with the gradients that the Fisher needs is a sum over columns, so
they are read a tile of columns at a time, whether they are in memory, on another device, or in a
file. Gradients are float32 as a rule; products and sums are float64, because dampings are up to 10⁶
times smaller than the eigenvalues of the Gram matrix (see
:mod:`~torchprune_bayes._numerics.precision` for devices without float64); where the damping is
large enough, :func:`damped_gram` takes float32. A tile is so small that its float64 copy stays in a
processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchprune_bayes._numerics.precision import float64_device, in_dtype, wide

_TILE_ENTRIES = 1 << 19
_TILE_COLUMNS = (512, 16384)
_ROWS = 128
_FEWEST_TO_HALVE = 64
_FEWEST_IN_CACHE = 8
_HARMLESS = 1e-2


class TiledGradients:
    """Gradients of one block that are read when they are needed.

    Args:
        read: Columns ``[N, stop − start]`` of a range.
        shape: ``(1, N, B)``.
        dtype: Of what is read.
        device: Of what is read.
    """

    def __init__(
        self,
        read: Callable[[int, int], Tensor],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.read, self.shape, self.dtype, self.device = read, torch.Size(shape), dtype, device


Gradients = Tensor | TiledGradients


def tiles(gradients: Gradients) -> Iterator[tuple[slice, Tensor]]:
    """Yield consecutive ranges of columns with their gradients ``[blocks, N, size]``."""
    least, most = _TILE_COLUMNS
    size = min(max(_TILE_ENTRIES // max(gradients.shape[:-1].numel(), 1), least), most)
    for start in range(0, max(gradients.shape[-1], 1), size):  # one tile at least
        stop = min(start + size, gradients.shape[-1])
        yield slice(start, stop), read(gradients, start, stop)


def read(gradients: Gradients, start: int, stop: int) -> Tensor:
    """The columns ``start:stop``, ``[blocks, N, stop − start]``."""
    if isinstance(gradients, Tensor):
        return gradients[..., start:stop]
    return gradients.read(start, stop).unsqueeze(0)


def gram(
    gradients: Gradients, keep: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return ``G diag(keep) Gᵀ``.

    Args:
        gradients: ``[..., N, B]`` of any float dtype.
        keep: Boolean ``[..., B]``, the columns that take part; default all.
        dtype: Of products and sums.

    Returns:
        ``[..., N, N]`` in ``dtype``.

    Example:
        >>> gram(torch.ones(2, 3), torch.tensor([True, True, False]))
        tensor([[2., 2.],
                [2., 2.]], dtype=torch.float64)
    """
    lower = _lower_gram(gradients, keep, dtype)
    count = lower.shape[-1]
    return lower if _rows(count) >= count else lower.tril() + lower.tril(-1).mT


def _lower_gram(gradients: Gradients, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    # The lower triangle, a few rows at a time; above it are zeros, and parts of the product.
    count, device = gradients.shape[-2], float64_device(gradients.device)
    total = torch.zeros((*gradients.shape[:-1], count), dtype=dtype, device=device)
    height = _rows(count)
    for where, tile in tiles(gradients):
        part = in_dtype(tile if keep is None else _kept(tile, keep[..., where]), dtype)
        for start in range(0, count, height):
            rows = slice(start, start + height)
            total[..., rows, : rows.stop] += part[..., rows, :] @ part[..., : rows.stop, :].mT
    return total


def damped_gram(gradients: Gradients, ridge: float, keep: Tensor | None = None) -> Tensor:
    """The lower triangle of ``G diag(keep) Gᵀ``, to which a ridge will be added.

    As precise as that asks for.

    Rounding the products of float32 gradients to float32 changes the matrix by about its trace
    times ``ε``, the spacing of float32 at 1. Where that is below a hundredth of the ridge for every
    block, whatever is solved with the sum changes less than by a damping that is one per cent
    larger or smaller, and float32 takes a third of the time.

    Args:
        gradients: ``[blocks, N, B]``.
        ridge: ``Nλ``.
        keep: Boolean ``[blocks, B]``.

    Returns:
        ``[blocks, N, N]``, undefined above the diagonal, in float32, or in float64: for a single
        block, whose products serve many dampings, and on accelerators, where asking for the traces
        would be a round trip.
    """
    cheap = gradients.device.type == "cpu" and gradients.dtype == torch.float32
    if cheap and gradients.shape[0] > 1:
        narrow = _lower_gram(gradients, keep, torch.float32)
        largest = float(narrow.diagonal(dim1=-2, dim2=-1).sum(-1).max())
        if largest * torch.finfo(narrow.dtype).eps <= _HARMLESS * ridge:
            return narrow
    return _lower_gram(gradients, keep, torch.float64)


def times(gradients: Gradients, columns: Tensor) -> Tensor:
    """Return ``G V`` in float64.

    Args:
        gradients: ``[..., N, B]``.
        columns: ``V``, ``[..., B, k]``.

    Returns:
        ``[..., N, k]`` float64.
    """
    if isinstance(gradients, Tensor):
        exact, pieces = wide(columns), _few_rows(gradients)
        # Converted in one place: allocating memory for each would cost more than the product.
        room = exact.new_empty(pieces[0].shape)
        return torch.cat(
            [room[..., : rows.shape[-2], :].copy_(rows) @ exact for rows in pieces], dim=-2
        )
    parts = [wide(tile) @ wide(columns[..., where, :]) for where, tile in tiles(gradients)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def whitened_squares(lower: Tensor, gradients: Tensor) -> Tensor:
    """Column sums of squares of ``L⁻¹G``, a few rows at a time.

    Args:
        lower: ``L⁻¹``, lower triangular ``[blocks, N, N]``.
        gradients: ``[blocks, N, B]``.

    Returns:
        ``[blocks, B]``.

    Example:
        >>> whitened_squares(torch.eye(2)[None], torch.tensor([[[1.0], [3.0]]]))
        tensor([[10.]])
    """
    count = gradients.shape[-2]
    height, sums = _rows(count), gradients.new_zeros(gradients.shape[::2])
    for start in range(0, count, height):
        stop = start + height
        sums += (lower[:, start:stop, :stop] @ gradients[:, :stop]).square_().sum(-2)
    return sums


def times_vector(gradients: Gradients, vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``G v``, ``[..., N]`` in ``dtype``, for a vector ``[..., B]``."""
    if dtype == torch.float64 or not isinstance(gradients, Tensor):
        return times(gradients, vector.unsqueeze(-1)).squeeze(-1)
    return (gradients * vector.to(dtype).unsqueeze(-2)).sum(-1)  # a product is slower here


def transposed_times(
    gradients: Gradients, rows: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return ``Gᵀ V``.

    Args:
        gradients: ``[..., N, B]``.
        rows: ``V``, ``[..., N, k]``.
        dtype: Of products and sums.

    Returns:
        ``[..., B, k]`` in ``dtype``.
    """
    across = in_dtype(rows, dtype).mT.contiguous()  # [..., k, N]
    shape = (*across.shape[:-1], gradients.shape[-1])
    product = torch.empty(shape, dtype=across.dtype, device=across.device)
    for where, tile in tiles(gradients):
        product[..., where] = across @ in_dtype(tile, dtype)
    return product.mT


def mean_squares(gradients: Gradients) -> Tensor:
    """``(1/N) Σ_n g_n²`` of every column, float64 ``[..., B]``."""
    if isinstance(gradients, Tensor) and _rows_in_cache(gradients) >= _FEWEST_IN_CACHE:
        return _sums_of_squares(gradients) / gradients.shape[-2]
    sums = [wide(tile.square().sum(-2)) for _, tile in tiles(gradients)]
    return torch.cat(sums, dim=-1) / gradients.shape[-2]


def _sums_of_squares(gradients: Tensor) -> Tensor:
    pieces = _few_rows(gradients)
    room = torch.empty_like(pieces[0])
    total = wide(room.new_zeros(gradients.shape[:-2] + gradients.shape[-1:]))
    for rows in pieces:
        total += torch.square(rows, out=room[..., : rows.shape[-2], :]).sum(-2)
    return total


def mean(gradients: Gradients) -> Tensor:
    """``(1/N) Σ_n g_n``, float64 ``[..., B]``."""
    return torch.cat([wide(tile.mean(-2)) for _, tile in tiles(gradients)], dim=-1)


def chosen_columns(gradients: Gradients, indices: Tensor) -> Tensor:
    """Some columns of every block.

    Args:
        gradients: ``[blocks, N, B]``.
        indices: ``[blocks, k]``.

    Returns:
        ``[blocks, N, k]`` in the gradients' dtype.
    """
    if isinstance(gradients, Tensor):
        if gradients.device.type == "cpu" and gradients.stride(0) == gradients.shape[-1]:
            starts = torch.arange(len(indices)).unsqueeze(1) * gradients.shape[-1]
            rows = gradients.transpose(0, 1).flatten(1)  # a view
            columns = columns_of(rows, (indices + starts).flatten())
            return columns.unflatten(1, indices.shape).transpose(0, 1)
        return gradients.gather(-1, indices.unsqueeze(1).expand(-1, gradients.shape[1], -1))
    columns = torch.zeros(
        (1, gradients.shape[1], indices.shape[1]), dtype=gradients.dtype, device=gradients.device
    )
    for where, tile in tiles(gradients):
        here = (indices[0] >= where.start) & (indices[0] < where.stop)
        if here.any():
            columns[..., here] = tile[..., indices[0][here] - where.start]
    return columns


def columns_of(rows: Tensor, indices: Tensor) -> Tensor:
    """``rows[:, indices]`` of a matrix, on the CPU row by row, which takes a quarter of the time.

    Example:
        >>> columns_of(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2, 0]))
        tensor([[3., 1.]])
    """
    if rows.device.type != "cpu":
        return rows.index_select(1, indices)
    out = rows.new_empty((len(rows), len(indices)))
    for row, chosen in zip(rows, out, strict=True):
        torch.index_select(row, 0, indices, out=chosen)
    return out


def _few_rows(gradients: Tensor) -> tuple[Tensor, ...]:
    """The gradients, so few rows at a time that these stay in a processor's cache."""
    return gradients.split(max(_rows_in_cache(gradients), 1), dim=-2)


def _rows_in_cache(gradients: Tensor) -> int:
    entries = max(gradients.shape[:-2].numel() * gradients.shape[-1], 1)
    return _TILE_ENTRIES // entries


def _rows(count: int) -> int:
    """How many rows of a triangle are computed at a time."""
    return max(count, 1) if count < _FEWEST_TO_HALVE else min(-(-count // 2), _ROWS)


def _kept(tile: Tensor, keep: Tensor) -> Tensor:
    if tile[..., 0, 0].numel() > 1 or tile.shape[-2] <= _ROWS:
        # Several blocks keep different columns; and for few rows multiplying is faster than
        # copying.
        return tile * keep.unsqueeze(-2)
    chosen = keep.reshape(-1).nonzero().squeeze(-1)
    return tile if len(chosen) == tile.shape[-1] else tile.index_select(-1, chosen)
