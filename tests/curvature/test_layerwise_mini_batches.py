"""Gradients of mini-batches: what the diagonal Fisher of a calibration is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from torchprune_bayes import Calibration, LayerCurvature
from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.errors import ArgumentError, CalibrationError


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class _Tokens(nn.Module):
    """A table, a broadcast parameter, one without samples, and a fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.places = nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.scale + self.places(torch.arange(5).unsqueeze(0))
        return self.head(torch.tanh(self.attention(x, x, x, need_weights=False)[0]))


def _convnet() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def _of_tokens(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, 1), target.flatten())


def _contrastive(output: Tensor, target: Tensor) -> Tensor:
    """Samples of a batch are compared with each other: no mean over samples."""
    products = normalize(output, dim=-1) @ normalize(output, dim=-1).mT
    return cross_entropy(products, target % len(target))


_IDS = torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(0))
_LABELS = torch.where(_IDS == 3, -100, _IDS.roll(1))
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor, Any]] = {
    "mlp": (_mlp, _normal(12, 5), torch.arange(12) % 3, cross_entropy),
    "convnet": (_convnet, _normal(12, 2, 4, 4), torch.arange(12) % 3, cross_entropy),
    "tokens": (_Tokens, _IDS, _LABELS, _of_tokens),
    "contrastive": (_mlp, _normal(12, 5), torch.arange(12), _contrastive),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8)
@given(mini_batch=st.sampled_from([2, 3, 4, 6]), batch_size=st.sampled_from([1, 5, 64]))
def test_diagonal_is_that_of_gradients_taken_one_by_one(
    case: str, mini_batch: int, batch_size: int
) -> None:
    torch.manual_seed(0)
    make, x, y, loss_fn = CASES[case]
    model = make().double()
    pairs = trainable_parameters(model)
    found = LayerCurvature(mini_batch=mini_batch, batch_size=batch_size)
    found = found.fit(Calibration(model, [(x, y)], loss_fn, pairs))
    rows = _gradients_of_groups(model, x, y, loss_fn, mini_batch)
    assert found.diagonal().keys() == rows.keys()
    for name, value in found.diagonal().items():
        torch.testing.assert_close(value, rows[name].square().mean(0), rtol=1e-7, atol=1e-12)
    assert found.count == 12 // mini_batch


def _gradients_of_groups(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: Any, size: int
) -> dict[str, Tensor]:
    """One backward pass per mini-batch through the model itself."""
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(
            loss_fn(model(inputs), target), list(parameters.values()), materialize_grads=True
        )
        for inputs, target in zip(x.split(size), y.split(size), strict=True)
    ]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def test_mini_batches_run_across_the_batches_of_the_data() -> None:
    torch.manual_seed(0)
    model, x, y = _mlp().double(), _normal(12, 5), torch.arange(12) % 3
    pieces = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    found = LayerCurvature(mini_batch=4).fit(Calibration(model, pieces, cross_entropy))
    whole = LayerCurvature(mini_batch=4).fit(Calibration(model, [(x, y)], cross_entropy))
    torch.testing.assert_close(found.diagonal(), whole.diagonal())


def test_mini_batches_of_several_shapes_are_refused() -> None:
    table = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    lengths = [(_IDS[:3, :size], _IDS[:3, :size]) for size in (4, 5)]
    curvature = LayerCurvature(mini_batch=2)
    with pytest.raises(CalibrationError, match="multiple of 2 samples"):
        curvature.fit_model(table, lengths, _of_tokens)
    even = [(ids[:2], labels[:2]) for ids, labels in lengths]
    assert curvature.fit_model(table, even, _of_tokens).count == 2


def test_mini_batches_need_the_empirical_fisher() -> None:
    with pytest.raises(ArgumentError, match="kind='empirical' with mini-batches"):
        LayerCurvature("ggn", mini_batch=2)
