"""Diagonals in which the positions of a sample are taken as samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, unfold

from torchprune_bayes import LayerCurvature
from torchprune_bayes.errors import ArgumentError


class _Called(nn.Module):
    """A layer at two places, with several positions, and a head."""

    def __init__(self, layer: nn.Module, features: int, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times
        self.head = nn.Linear(features, 3)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            output = self.layer(x)
            self.seen.append((x, output))
            x = torch.tanh(output)
        return self.head(x.flatten(1))


def _outer(a: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("to,ti->oi", g.flatten(0, -2).square(), a.flatten(0, -2).square())


def _of_patches(a: Tensor, g: Tensor) -> Tensor:
    columns = unfold(a, 2).square()
    return torch.einsum("bot,bit->oi", g.flatten(2).square(), columns).unflatten(1, (2, 2, 2))


def _of_rows(a: Tensor, g: Tensor) -> Tensor:
    return torch.zeros(5, 2).to(g).index_add(0, a.flatten(), g.flatten(0, 1).square())


CASES: list[tuple[Callable[[], nn.Module], Tensor, int, int, Callable[..., Tensor]]] = [
    (lambda: nn.Linear(4, 4), torch.randn(6, 3, 4), 12, 1, _outer),
    (lambda: nn.Linear(4, 4), torch.randn(6, 3, 4), 12, 2, _outer),
    (lambda: nn.Linear(4, 4), torch.randn(6, 4), 4, 1, _outer),
    (lambda: nn.Conv2d(2, 4, 2), torch.randn(6, 2, 4, 4), 36, 1, _of_patches),
    (lambda: nn.Embedding(5, 2), torch.randint(5, (6, 3)), 6, 1, _of_rows),
]


@pytest.mark.parametrize(("build", "x", "features", "times", "squares"), CASES)
def test_they_are_sums_of_squares_of_positions(
    build: Any, x: Tensor, features: int, times: int, squares: Any
) -> None:
    torch.manual_seed(0)
    model, y = _Called(build(), features, times), torch.arange(6) % 3
    curvature = LayerCurvature(positions="independent").fit_model(model, [(x, y)], cross_entropy)
    model.seen.clear()
    loss = cross_entropy(model(x), y) * len(x)
    gradients = torch.autograd.grad(loss, [output for _, output in model.seen])
    parts = [squares(a.detach(), g) for (a, _), g in zip(model.seen, gradients, strict=True)]
    expected = torch.stack(parts).sum(0) / len(x)
    torch.testing.assert_close(curvature.diagonal()["layer.weight"], expected)


class _Experts(nn.Module):
    """Layers that see some of the tokens of some samples, and one that no token reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        out = torch.zeros_like(tokens)
        for index, chosen in enumerate((tokens[:, 0] > 0, tokens[:, 0] <= 0)):
            if chosen.any():
                a = tokens[chosen]
                output = self.experts[index](a)
                self.seen[index] = (a, output)
                out[chosen] = output
        return self.head(out.view_as(x).tanh().sum(1))


def test_tokens_of_experts_are_squared_one_by_one_wherever_they_are() -> None:
    torch.manual_seed(0)
    model, x, y = _Experts(), torch.randn(8, 5, 4), torch.arange(8) % 3
    curvature = LayerCurvature(positions="independent", batch_size=8)
    curvature.fit_model(model, [(x, y)], cross_entropy)
    loss = cross_entropy(model(x), y) * len(x)
    for index, (a, output) in model.seen.items():
        assert len(a) % len(x)  # no whole number of tokens of each sample
        (g,) = torch.autograd.grad(loss, output, retain_graph=True)
        found = curvature.diagonal()[f"experts.{index}.weight"]
        torch.testing.assert_close(found, _outer(a, g).detach() / len(x))
    assert not curvature.diagonal()["experts.2.weight"].any()
    assert curvature.coverage["experts.0.weight"] == "Linear (factors of whole batches)"


def test_no_batch_follows_when_there_were_labels_enough() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(24, 4), torch.arange(24) % 3
    found = LayerCurvature(most_terms=9, batch_size=5).fit_model(model, [(x, y)], cross_entropy)
    assert found.count == found.num_terms == 10
    assert LayerCurvature(batch_size=5).fit_model(model, [(x, y)], cross_entropy).count == 24


@pytest.mark.parametrize("options", [{"positions": "some"}, {"most_terms": 0}])
def test_impossible_options_are_refused(options: Any) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        LayerCurvature(**options)
