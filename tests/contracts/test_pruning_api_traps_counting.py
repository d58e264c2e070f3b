"""T10 to T14: which entries ``torch.nn.utils.prune`` counts, and how often."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.contracts.cases import batches, calibration_of, live_count, masks_by_place, mlp, pairs
from tests.contracts.state import unchanged
from torchprune_bayes import (
    Calibration,
    Magnitude,
    WoodFisher,
    bake,
    prune_global,
)
from torchprune_bayes.errors import (
    ArgumentError,
    ArgumentTypeError,
    TorchPruneBayesError,
)
from torchprune_bayes.params import ParameterSpace

PLAIN = {"damping": 0.01, "update_scale": 1.0, "block_size": "full"}


def convolutions() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))


def test_t10_channels_last_and_non_contiguous_weights():
    """``view(-1)`` inside PyTorch refuses both."""
    model, reference = convolutions(), convolutions()
    model = model.to(memory_format=torch.channels_last)
    model[1].weight.data = model[1].weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    for amount in (0.5, 0.3):
        prune_global(pairs(model), Magnitude, amount=amount)
        prune.global_unstructured(pairs(reference), prune.L1Unstructured, amount=amount)
    assert all(map(torch.equal, masks_by_place(model), masks_by_place(reference)))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), reference(x))
    Magnitude.apply(model[0], "weight", amount=0.5)
    assert int(model[0].weight_mask.sum()) == round(int(reference[0].weight_mask.sum()) * 0.5)


@pytest.mark.parametrize(
    ("amount", "kept"),
    [
        (0.2, 36),
        (np.float32(0.2), 36),
        (9, 36),
        (np.int64(9), 36),
        (1, 44),
        (1.0, 0),
        (0, 45),
        (0.0, 45),
        (45, 0),
    ],
)
def test_t11_amount_is_the_hosts(amount, kept):
    """A float is a fraction of what is left, an int a count: ``1`` is one entry, ``1.0`` all."""
    model, other = mlp(), mlp()
    prune_global(pairs(model), Magnitude, amount=amount)
    prune.global_unstructured(pairs(other), prune.L1Unstructured, amount=amount)
    assert live_count(model) == live_count(other) == kept


@pytest.mark.parametrize(
    ("amount", "error"),
    [
        (46, ArgumentError),
        (-1, ArgumentError),
        (1.5, ArgumentError),
        (float("nan"), ArgumentError),
        (True, ArgumentTypeError),
        ("0.5", ArgumentTypeError),
        (None, ArgumentTypeError),
        (torch.tensor(0.5), ArgumentTypeError),
    ],
)
def test_t11_impossible_amounts_are_refused(amount, error):
    """PyTorch finds out about some of them late, or not at all."""
    model = mlp()
    with unchanged(model), pytest.raises(error, match="amount"):
        prune_global(pairs(model), Magnitude, amount=amount)


def test_t11_amounts_add_up_on_what_is_left():
    """0.2 of everything and then 0.2 of the rest are 0.36."""
    model = mlp()
    prune_global(pairs(model), Magnitude, amount=0.2)
    prune_global(pairs(model), Magnitude, amount=0.25)
    assert live_count(model) == 27


@pytest.mark.parametrize("method", [Magnitude, WoodFisher])
def test_t12_masked_originals_may_drift(method):
    """Momentum and weight decay move masked entries of ``weight_orig``."""
    model = mlp()
    options = {} if method is Magnitude else {"calibration": calibration_of(model), **PLAIN}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x, y = batches()[0]
    cross_entropy(model(x), y).backward()
    optimizer.step()
    prune_global(pairs(model), method, amount=0.5, **options)
    first = masks_by_place(model)
    with torch.no_grad():
        for (module, _), mask in zip(pairs(model), first, strict=True):
            module.weight_orig[~mask] = 100.0
    optimizer.step()  # no forward pass follows, so `weight` lags behind `weight_orig`
    space = ParameterSpace(model, pairs(model))
    assert max(float(value.abs().max()) for value in space.values().values()) < 10
    prune.global_unstructured(pairs(model), method, amount=0.5, **options)
    prune_global(pairs(model), method, amount=0.5, **options)
    second = masks_by_place(model)
    assert not any((new & ~old).any() for new, old in zip(second, first, strict=True))
    assert live_count(model) == 5  # 45 - 22 - 12 - 6


class Tied(nn.Module):
    """Logits over the vocabulary from the embedding's own weights, as language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_t13_bake_writes_the_zeros_through_ties_and_keeps_these():
    """PyTorch's ``remove`` writes zeros into whatever shares the tensor."""
    model = Tied()
    shared = model.embedding.weight
    prune_global([(model.head, "weight")], Magnitude, amount=0.5)
    assert int((shared == 0).sum()) == 0
    bake(model)
    assert model.head.weight is model.embedding.weight is shared
    assert int((shared == 0).sum()) == 20
    assert not prune.is_pruned(model)


@pytest.mark.parametrize("method", [Magnitude, prune.RandomUnstructured])
def test_t14_a_tied_tensor_in_the_list_twice_counts_once(method):
    """PyTorch counts it twice, and gives its places different masks."""
    model = Tied()
    twice = [(model.embedding, "weight"), (model.head, "weight")]
    for kept in (20, 10):
        decision = prune_global(twice, method, amount=0.5)
        assert sum(int(mask.sum()) for mask in decision.masks.values()) == kept
        assert int(model.head.weight_mask.sum()) == kept
        assert torch.equal(model.head.weight_mask, model.embedding.weight_mask)
    tokens = torch.arange(10)
    before = model(tokens)
    assert model.head.weight_orig is model.embedding.weight_orig
    bake(model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model(tokens), before)


def test_t14_a_calibration_refuses_it():
    """A method that looks at gradients is told about ties instead of guessing."""
    model = Tied()
    twice = [(model.embedding, "weight"), (model.head, "weight")]
    with pytest.raises(TorchPruneBayesError, match="tied weights are one tensor"):
        Calibration(model, [(torch.arange(4), torch.arange(4))], cross_entropy, params=twice)
    calibration = Calibration(
        model, [(torch.arange(4), torch.arange(4))], cross_entropy, params=twice[1:]
    )
    prune_global(twice, WoodFisher, amount=0.5, calibration=calibration)
    assert torch.equal(model.head.weight_mask, model.embedding.weight_mask)
