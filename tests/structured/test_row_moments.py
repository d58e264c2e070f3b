"""Moments of a layer's rows, from pixels or patches, against rows that are cut out one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.input_moments import Moments
from torchprune_bayes.structured._layer_inputs import rows_of
from torchprune_bayes.structured._reader import Reader
from torchprune_bayes.structured._row_moments import RowMoments

CASES: dict[str, tuple[Any, list[tuple[int, ...]]]] = {
    "pixels of 3 x 3": (nn.Conv2d(16, 2, 3, padding=1), [(4, 5)]),
    "pixels at edges alone": (nn.Conv2d(16, 2, 3, padding=1), [(2, 2)]),
    "a single pixel": (nn.Conv2d(16, 2, 3, padding=1), [(1, 1)]),
    "taps that come later": (nn.Conv2d(16, 2, 3, padding=1), [(1, 1), (1, 3), (4, 4), (2, 2)]),
    "stride, some taps": (nn.Conv2d(5, 2, 3, stride=2, padding=1), [(2, 2), (2, 4)]),
    "circular": (nn.Conv2d(16, 2, 3, padding=1, padding_mode="circular"), [(3, 4)]),
    "lines": (nn.Conv1d(16, 2, 5, padding=2), [(9,), (2,)]),
    "transposed": (nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1), [(3, 2)]),
    "volumes": (nn.Conv3d(3, 2, 2, padding=1), [(2, 1, 2)]),
    "linear": (nn.Linear(6, 2), [()]),
}


def inputs_of(layer: Any, sizes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels = getattr(layer, "in_channels", None) or layer.in_features
    shapes = [(3, channels, *size) if size else (3, 4, channels) for size in sizes]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 for shape in shapes]


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_all_rows(name: str) -> None:
    layer, sizes = CASES[name]
    batches = inputs_of(layer, sizes)
    entries = layer.weight[0].numel() if name != "transposed" else 4 * 9
    found = RowMoments(layer, entries // layer.weight[0, 0].numel(), torch.device("cpu"))
    expected = (
        Moments.zeros(entries, torch.device("cpu")),
        Moments.zeros(entries, batches[0].device),
    )
    for batch in batches:
        for half in (0, 1):
            found.add(half, batch[half::2], per_sample=10**6)
            for rows in rows_of(layer, batch[half::2], 10**6, torch.Generator()):
                expected[half].add(rows)
    seen, *halves = found.halves()
    assert seen.equal(expected[0].products.diagonal() > 0)
    for moments, wanted in zip(halves, expected, strict=True):
        assert moments.count == wanted.count
        torch.testing.assert_close(moments.total, wanted.total[seen])
        torch.testing.assert_close(moments.products, wanted.products[seen][:, seen])


def test_taps_that_only_see_padding_take_no_memory() -> None:
    found = RowMoments(nn.Conv2d(64, 2, 3, padding=1), 64, torch.device("cpu"))
    found.add(0, torch.ones(2, 64, 1, 1), per_sample=9)
    assert found.both()[0].products.shape == (64, 64)
    assert found.halves()[0].sum() == 64


@pytest.mark.parametrize("name", ["pixels of 3 x 3", "linear"])
def test_inputs_without_a_batch_are_one_sample(name: str) -> None:
    layer = CASES[name][0]
    shape = (16, 4, 5) if name != "linear" else (6,)
    one, other = (Reader("weight", "", layer, 1) for _ in range(2))
    for index in range(2):
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        one.observe(inputs, 2)
        other.observe(inputs[None], 2)
    assert one.rows is not None
    assert other.rows is not None
    for found, expected in zip(one.rows.both(), other.rows.both(), strict=True):
        assert found.count == expected.count > 0
        assert torch.equal(found.products, expected.products)
