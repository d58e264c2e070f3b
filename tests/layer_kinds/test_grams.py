from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, unfold

from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.layer_kinds import grams
from torchprune_bayes.layer_kinds.convolution import PatchProducts, axis_of, patches
from torchprune_bayes.layer_kinds.grams import Axis, Gram, PatchGram, shares_products

CHANNELS = 3


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _of_patches(layer: Any, images: list[Tensor]) -> Tensor:
    cut = [patches(layer, part) for part in images]
    return torch.stack([torch.einsum("nkt,nlt->kl", c, c) for c in cut]).sum(0)


def _found(layer: Any, images: list[Tensor]) -> tuple[Any, Tensor]:
    """What a layer's products sum up to, with whatever it chooses to add them by."""
    gram = None
    for part in images:
        left, cut = layer(part).detach().flatten(2).unsqueeze(1), patches(layer, part).unsqueeze(1)
        use = PatchProducts(layer, part, left, cut.__getitem__)
        gram = use.new_input_gram(part) if gram is None else gram
        use.add_input_gram(gram)
    assert gram is not None
    return gram, gram.matrix()


@pytest.fixture
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over distances, also where that is more work."""
    monkeypatch.setattr(grams, "_LEAST_CHANNELS", 0)
    monkeypatch.setattr(grams, "_LEAST_GAIN", 0.0)


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (4, 2)])
def test_patches_need_not_be_cut_out(kernel: tuple[int, int], mode: Any) -> None:
    steps: list[Any] = [1, 2, (3, 1)]
    margins: list[Any] = [0, 1, (2, 1)]
    for stride, dilation, padding in itertools.product(steps, [1, 2], margins):
        layer = nn.Conv2d(
            CHANNELS,
            2,
            kernel,
            stride=stride,
            dilation=dilation,
            padding=padding,
            padding_mode=mode,
            dtype=torch.float64,
        )
        images = [_normal(2, CHANNELS, 7, 9), _normal(1, CHANNELS, 8, 7)]
        gram, found = _found(layer, images)
        assert isinstance(gram, PatchGram)
        torch.testing.assert_close(found, _of_patches(layer, images), rtol=1e-12, atol=1e-12)
        assert torch.equal(found, found.mT)


@pytest.mark.usefixtures("_always")
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)
)
def test_any_way_along_a_line(taps: int, size: int, stride: int, dilation: int, zeros: int) -> None:
    layer = nn.Conv1d(
        CHANNELS, 2, taps, stride, padding=zeros, dilation=dilation, dtype=torch.float64
    )
    least = dilation * (taps - 1) + 1 - 2 * zeros
    images = [_normal(2, CHANNELS, size + max(0, least))]
    gram, found = _found(layer, images)
    assert isinstance(gram, PatchGram)
    torch.testing.assert_close(found, _of_patches(layer, images), rtol=1e-12, atol=1e-12)


def test_order_is_that_of_unfolded_images() -> None:
    images = _normal(2, CHANNELS, 5, 6)
    gram = PatchGram(CHANNELS, Axis(2), Axis(3), images)
    gram.add(images)
    cut = unfold(images, (2, 3))
    torch.testing.assert_close(gram.matrix(), torch.einsum("nkt,nlt->kl", cut, cut))


@pytest.mark.parametrize("size", [5, 600])
def test_sum_of_outer_products(size: int) -> None:
    gram, parts = Gram(size, _normal(1)), [_normal(2, 1, size, 3), _normal(4, 1, size, 1)]
    for part in parts:
        gram.add(part)
    columns = torch.cat([part.movedim(2, 0).flatten(1) for part in parts], dim=1)
    found = gram.matrix()
    torch.testing.assert_close(found, columns @ columns.T)
    assert torch.equal(found, found.mT)


def test_used_where_there_is_something_to_share() -> None:
    wide, narrow = nn.Conv2d(32, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    pointwise, strided = nn.Conv2d(32, 4, 1), nn.Conv2d(32, 4, 3, stride=2, padding=1)
    for layer, size, expected in (
        (wide, 16, True),
        (wide, 2, True),
        (wide, 1, True),
        (narrow, 16, False),
        (pointwise, 16, False),
        (strided, 16, False),
    ):
        padded = size + 2 * int(layer.padding[0])
        axes = axis_of(layer, 0), axis_of(layer, 1)
        assert shares_products(layer.in_channels, *axes, (padded, padded)) == expected


@pytest.mark.parametrize("structure", ["kronecker", "both"])
def test_factors_are_the_same_either_way(structure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 5, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(5 * 36, 3),
    ).double()
    data = [(_normal(6, 2, 6, 6), torch.arange(6) % 3)]
    fits = []
    for least in (16, 1000):
        monkeypatch.setattr(grams, "_LEAST_CHANNELS", least)
        curvature = LayerCurvature(structure=structure, batch_size=4)
        fits.append(curvature.fit_model(model, data, cross_entropy).sums)
    assert fits[0].keys() == fits[1].keys()
    for key, value in fits[0].items():
        torch.testing.assert_close(value, fits[1][key], rtol=1e-11, atol=1e-13)
