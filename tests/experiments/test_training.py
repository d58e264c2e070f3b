"""The training loop of the experiments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchprune_bayes.experiments.description import Decay, Recipe
from torchprune_bayes.experiments.examples import Examples
from torchprune_bayes.experiments.training import Training, _augmented


def made(recipe: Recipe, epochs: int = 4, samples: int = 32) -> Training:
    torch.manual_seed(0)
    data = Examples(torch.randn(samples, 6), torch.arange(samples) % 3)
    return Training(nn.Linear(6, 3), data, recipe, epochs)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_an_epoch_makes_an_update_for_each_batch_and_calls_back(optimizer):
    training = made(Recipe(4, optimizer, 0.1, 8, clip=1.0))
    before, calls = training.model.weight.detach().clone(), []
    training.epoch(
        penalty=lambda: calls.append("penalty") or torch.zeros(()),
        after_backward=lambda: calls.append("backward"),
        after_step=lambda: calls.append("step"),
    )
    assert calls == ["penalty", "backward", "step"] * 4
    assert not torch.equal(training.model.weight, before)
    assert training.flops.total == 32 * 2 * 18
    assert training.steps == 16


def test_rates_follow_the_recipe():
    def rates(schedule, epochs):
        training = made(Recipe(10, "sgd", 1.0, 32, schedule), epochs)
        found = []
        for _ in range(epochs):
            found.append(training.optimizer.param_groups[0]["lr"])
            training.epoch()
        return found

    assert rates("constant", 3) == [1.0, 1.0, 1.0]
    assert rates("cosine", 4) == pytest.approx([1.0, 0.8536, 0.5, 0.1464], abs=1e-4)
    decay = Decay(begin=4, end=8, every=2, factor=0.5)
    expected = [1.0] * 4 + [0.5] * 2 + [0.25] * 2 + [0.125] * 2
    assert rates(decay, 10) == pytest.approx(expected)
    assert rates(decay, 5) == pytest.approx(expected[::2])  # at half the scale


def test_images_are_shifted_and_mirrored_one_by_one():
    torch.manual_seed(0)
    x = torch.rand(64, 2, 6, 6)
    recipe = Recipe(1, "sgd", 0.1, 8, flip=0.5, crop=2)
    found = _augmented(x, recipe)
    padded = nn.functional.pad(x, [2] * 4)
    shifts = set()
    for image, whole in zip(found, padded, strict=True):
        places = [
            (flip, i, j)
            for flip, source in ((0, whole), (1, whole.flip(2)))
            for i in range(5)
            for j in range(5)
            if torch.equal(image, source[:, i : i + 6, j : j + 6])
        ]
        assert len(places) == 1
        shifts |= set(places)
    assert len(shifts) > 20
    flat = torch.rand(3, 5)
    assert _augmented(flat, recipe) is flat
