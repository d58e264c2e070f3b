"""Layers that calibration data hardly reach, under every method that sees layers' inputs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM

from tests.curvature.test_layer_inputs import Experts, Twice
from torchprune_bayes import Calibration, prunable_parameters, prune_global
from torchprune_bayes.errors import CalibrationWarning, ParameterWarning

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("layerwise", {}),
    ("layerwise", {"solver": "exact"}),
    ("layerwise", {"solver": "sequential"}),
    ("layerwise", {"scores": "magnitude"}),
    ("layerwise", {"scores": "kfac"}),
    ("sparsegpt", {}),
    ("sparsegpt", {"scope": "global"}),
    ("wanda", {}),
    ("alps", {}),
    ("kfac", {}),
]
Prepared = tuple[nn.Module, Any, Any]


class Branches(nn.Module):
    """A layer whose inputs are a constant, beside one that sees the data."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.seen, self.other = nn.Linear(4, 4), nn.Linear(4, 2)
        self.last = nn.Linear(4, 2)
        self.constant = constant

    def forward(self, x):
        return self.last(self.seen(x).tanh()) + self.other(torch.full_like(x, self.constant))


class Shapes(nn.Module):
    """A layer that is called with vectors, with sequences and with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        tokens = self.shared(x[:, None, None].expand(-1, 2, 3, -1)).sum((1, 2))
        return self.last(self.shared(x) + tokens + self.shared(x[:0]).sum(0))


def samples(inputs: int, *, zero: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(24, inputs)
    if zero is not None:
        x[:, zero] = 0.0
    return x, torch.arange(24) % 2


def mixtral() -> Prepared:
    config = MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=1,
        max_position_embeddings=16,
    )
    ids = torch.randint(20, (2, 4))
    return MixtralForCausalLM(config).eval(), {"input_ids": ids, "labels": ids}, None


MODELS = {
    "zero column": lambda: (nn.Linear(4, 2), samples(4, zero=1), cross_entropy),
    "zeros alone": lambda: (Branches(0.0), samples(4), cross_entropy),
    "tiny inputs": lambda: (Branches(1e-20), samples(4), cross_entropy),
    "an expert that no token reaches": lambda: (Experts(), samples(3), cross_entropy),
    "called twice": lambda: (Twice(), samples(3), cross_entropy),
    "other shapes": lambda: (Shapes(), samples(4), cross_entropy),
    "mixtral": mixtral,
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_as_many_entries_go_as_asked_and_no_weight_is_ruined(case, method, options):
    torch.manual_seed(0)
    model, batch, loss = MODELS[case]()
    with warnings.catch_warnings():
        if case == "mixtral":  # whose experts are one tensor, from some version on
            warnings.simplefilter("ignore", ParameterWarning)
        params = prunable_parameters(model)
    calibration = Calibration(
        model, [batch], loss, params=params, num_samples=2 if loss is None else 24
    )
    names = calibration.space.names
    before = {name: value.clone() for name, value in calibration.space.values().items()}
    total = sum(value.numel() for value in before.values())
    with warnings.catch_warnings():
        if "expert" in case:
            warnings.simplefilter("ignore", CalibrationWarning)
        decision = prune_global(None, method, amount=0.5, calibration=calibration, **options)
    left = sum(int(mask.sum()) for mask in decision.masks.values())
    assert abs(left - total / 2) <= len(names)
    after = calibration.space.values()
    for name in names:
        assert after[name].isfinite().all()
        assert not after[name][~decision.masks[name]].any()
        assert after[name].abs().max() < 100 * before[name].abs().max()


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_a_layer_that_sees_zeros_alone_keeps_the_weights_that_remain(method, options):
    torch.manual_seed(0)
    model = Branches(0.0)
    dense = model.other.weight.detach().clone()
    calibration = Calibration(model, [samples(4)], cross_entropy, num_samples=24)
    mask = prune_global(None, method, amount=0.5, calibration=calibration, **options).masks[
        "other.weight"
    ]
    torch.testing.assert_close(model.other.weight, dense * mask)
