from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from tests.references.layer_curvature import empirical_diagonal, ggn, split
from torchprune_bayes.curvature import LayerCurvature, trainable_parameters

SAMPLES = 6


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class TinyViT(nn.Module):
    """Class token, position embeddings and layer scale are parameters of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 4))
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = tokens + self.pos_embed
        tokens = tokens + self.gamma * torch.tanh(self.mix(self.norm(tokens))).cumsum(1)
        return self.head(tokens.tanh().mean(1))


class ChannelScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.scale = nn.Parameter(torch.randn(3, 1, 1))
        self.temperature = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.conv(x)).tanh().mean((2, 3)) / self.temperature


class Attention(nn.Module):
    """Weights that functions use, and not the layers that hold them."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        found, _ = self.attention(x, x, x, need_weights=False)
        return self.head(found).mean(1 if self.batch_first else 0)


class MatrixOutside(nn.Module):
    """A weight that is used by its layer, and once more behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(x)) @ self.fc.weight)


class Query(nn.Module):
    """A layer whose input is a vector of the model's own, with no dimension for samples."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(4))
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * self.fc(self.query)))


class ManyParts(nn.Module):
    """No vmap: control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight * (1.0 if float(x.detach().sum()) > -1e9 else 2.0)


def _weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str]]] = {
    "vit": (
        TinyViT,
        _normal(SAMPLES, 1, 4, 4),
        {
            "cls_token": "one copy per sample",
            "pos_embed": "one copy per sample",
            "gamma": "one copy per sample",
            "patch.weight": "Conv2d",
            "norm.bias": "LayerNorm",
            "head.bias": "Linear",
        },
    ),
    "channel-scale": (
        ChannelScale,
        _normal(SAMPLES, 1, 4, 4),
        {"scale": "one copy per sample", "temperature": "one copy per sample"},
    ),
    "attention": (
        lambda: Attention(True),
        _normal(SAMPLES, 5, 4),
        {"attention.in_proj_weight": "one by one (vmap)", "head.weight": "Linear"},
    ),
    "attention-sequence-first": (
        lambda: Attention(False),
        _normal(SAMPLES, 5, 4),
        {"attention.out_proj.weight": "one by one (vmap)", "head.weight": "one by one (vmap)"},
    ),
    "used-outside": (
        MatrixOutside,
        _normal(SAMPLES, 4),
        {"fc.weight": "one by one (vmap)", "fc.bias": "Linear"},
    ),
    "query": (
        Query,
        _normal(SAMPLES, 4),
        {"fc.weight": "one by one (vmap)", "query": "one copy per sample", "head.bias": "Linear"},
    ),
    "no-vmap": (ManyParts, _normal(SAMPLES, 4), {"weight": "one by one (loop)"}),
    "weight-norm": (
        _weight_norm,
        _normal(SAMPLES, 4),
        {"0.parametrizations.weight.original0": "one by one (vmap)", "1.bias": "Linear"},
    ),
}


def _case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, x, _ = CASES[name]
    return make().double(), x, torch.arange(SAMPLES) % 3


@pytest.mark.parametrize("name", CASES)
def test_what_no_rule_covers_is_differentiated_in_another_way(name: str) -> None:
    model, x, y = _case(name)
    expected = empirical_diagonal(model, [(x, y)], cross_entropy, trainable_parameters(model))
    found = LayerCurvature().fit_model(model, [(x[:4], y[:4]), (x[4:], y[4:])], cross_entropy)
    assert found.diagonal().keys() == expected.keys() == found.coverage.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found.diagonal()[key], value, rtol=1e-9, atol=1e-15)
    for key, how in CASES[name][2].items():
        assert found.coverage[key] == how


@pytest.mark.parametrize("name", ["vit", "channel-scale", "no-vmap"])
def test_ggn_of_what_no_rule_covers(name: str) -> None:
    model, x, y = _case(name)
    expected = split(ggn(copy.deepcopy(model).eval(), x, y, cross_entropy).diagonal(), model)
    found = LayerCurvature("ggn").fit_model(model, [(x, y)], cross_entropy)
    for key, value in expected.items():
        torch.testing.assert_close(found.diagonal()[key], value, rtol=1e-9, atol=1e-15)


def test_pruned_entries_have_no_curvature_and_names_stay() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    plain = copy.deepcopy(model)
    prune.random_unstructured(model[0], "weight", 0.4)
    with torch.no_grad():
        plain[0].weight *= model[0].weight_mask
    x, y = _normal(SAMPLES, 4), torch.arange(SAMPLES) % 3
    found = LayerCurvature().fit_model(model, [(x, y)], cross_entropy)
    expected = LayerCurvature().fit_model(plain, [(x, y)], cross_entropy)
    assert set(found.masks) == set(expected.masks)
    torch.testing.assert_close(
        found.diagonal()["0.weight"], expected.diagonal()["0.weight"] * model[0].weight_mask
    )
    assert torch.equal(found.masks["0.weight"], model[0].weight_mask.bool())
    assert set(found.coverage.values()) == {"Linear"}


def test_frozen_layers_are_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = _normal(SAMPLES, 4), torch.arange(SAMPLES) % 3
    expected = LayerCurvature().fit_model(model, [(x, y)], cross_entropy).diagonal()
    model[0].requires_grad_(False)
    found = LayerCurvature().fit_model(model, [(x, y)], cross_entropy).diagonal()
    assert list(found) == ["2.weight", "2.bias"]
    torch.testing.assert_close(found["2.weight"], expected["2.weight"])


def test_rules_are_checked_on_samples_with_labels_that_count() -> None:
    torch.manual_seed(0)
    model = Attention(True).double()
    x, y = _normal(SAMPLES, 5, 4), torch.tensor([-100, -100, -100, 2, -100, 1])
    found = LayerCurvature().fit_model(model, [(x, y)], cross_entropy)
    kept = LayerCurvature().fit_model(model, [(x[[3, 5]], y[[3, 5]])], cross_entropy)
    assert found.coverage == kept.coverage
    for key, value in kept.diagonal().items():
        torch.testing.assert_close(found.diagonal()[key] * SAMPLES, value * 2)


def test_zeros_prove_nothing_about_copies() -> None:
    torch.manual_seed(0)
    model = TinyViT().double()
    nn.init.zeros_(model.head.weight)
    x, y = _normal(SAMPLES, 1, 4, 4), torch.arange(SAMPLES) % 3
    curvature = LayerCurvature().fit_model(model, [(x, y)], cross_entropy)
    assert curvature.coverage["cls_token"] == "one by one (vmap)"
    assert not curvature.diagonal()["cls_token"].any()


def test_the_same_model_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, y = _case("vit")
    curvature = LayerCurvature().fit_model(model, [(x, y)], cross_entropy)
    before = curvature.diagonal()
    monkeypatch.setattr("torchprune_bayes.curvature.layerwise.verified_routes", None)
    again = curvature.fit_model(model, [(x, y)], cross_entropy).diagonal()
    for key, value in before.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)


def test_a_bias_whose_gradient_is_zero_stays_with_its_rule() -> None:
    """Adding a constant to all keys changes no attention: what is left is rounding."""

    class KeyBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            weights = (self.query(x) @ self.key(x).mT).softmax(-1)
            return self.head(weights @ x).mean(1)

    torch.manual_seed(0)
    x, y = _normal(SAMPLES, 5, 4).float(), torch.arange(SAMPLES) % 3
    found = LayerCurvature().fit_model(KeyBias(), [(x, y)], cross_entropy)
    assert set(found.coverage.values()) == {"Linear"}


class Halves(nn.Module):
    """Pads an odd batch for a layer that works on pairs of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        extra: Any = x[:1].detach() if len(x) > 2 and len(x) % 2 else x[:0]
        return self.fc(torch.cat([x, extra]))[: len(x)]


class Routed(nn.Module):
    """Experts that see the samples that begin with their sign: of two, perhaps both."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            if chosen.any():
                out[chosen] = expert(x[chosen])
        return self.fc(out)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("build", [Halves, Routed])
def test_layers_that_see_parts_of_samples_in_some_batches_only(
    build: Callable[[], nn.Module], verify: bool
) -> None:
    torch.manual_seed(0)
    x, y = _normal(9, 4), torch.arange(9) % 3
    x[:4, 0] = 1.0
    x[4:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    model: Any = build().double()
    expected = empirical_diagonal(model, [(x, y)], cross_entropy, trainable_parameters(model))
    found = LayerCurvature(batch_size=5, verify=verify).fit_model(model, [(x, y)], cross_entropy)
    for key, value in expected.items():
        torch.testing.assert_close(found.diagonal()[key], value, rtol=1e-9, atol=1e-15)
    assert found.count == 9
    names = [key for key, how in found.coverage.items() if how.startswith("one by one")]
    assert any(name.startswith("fc" if build is Halves else "experts.0") for name in names)
    assert not model.fc._forward_hooks


def test_layers_in_channels_last_order_keep_their_rules() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    x, y = torch.randn(5, 2, 4, 4), torch.arange(5) % 2
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=order)
        fitted = LayerCurvature().fit_model(model, [(x.to(memory_format=order), y)], cross_entropy)
        assert fitted.coverage["0.weight"] == "Conv2d"
        found.append(fitted.diagonal())
    torch.testing.assert_close(found[0], found[1])
