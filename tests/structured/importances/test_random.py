"""Random scores: the same again, others with another seed, no trace in the generators."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.state import unchanged
from tests.structured.models import build, images
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.structured import UnitGroup, find_groups, shrink
from torchprune_bayes.structured.importances.random import RandomImportance


def test_scores_depend_on_seed_name_and_size_alone():
    model, inputs = build("vgg"), images()
    first, second = find_groups(model, inputs)[:2]
    with unchanged(model):
        scores = RandomImportance(3).score(first, model)
    assert torch.equal(scores, RandomImportance(3).score(first, build("vgg", seed=5)))
    assert scores.shape == (first.units,)
    assert not torch.equal(scores, RandomImportance(4).score(first, model))
    other = UnitGroup("another", "channel", first.units, ())
    assert not torch.equal(scores, RandomImportance(3).score(other, model))
    assert RandomImportance(3).score(second, model).shape == (second.units,)


def test_scores_are_uniform():
    scores = RandomImportance().score(UnitGroup("wide", "hidden", 20000, ()), build("vgg"))
    assert 0.0 <= float(scores.min()) <= float(scores.max()) < 1.0
    # Five standard errors of the mean and of the mean square of a uniform variable.
    assert abs(float(scores.mean()) - 1 / 2) < 5 * (1 / 12 / 20000) ** 0.5
    assert abs(float(scores.square().mean()) - 1 / 3) < 5 * (4 / 45 / 20000) ** 0.5


def test_shrinks_alike_twice():
    shapes = []
    for _ in range(2):
        model, inputs = build("resnet"), images()
        shrink(model, inputs, RandomImportance(1), sparsity=0.5, steps=2)
        shapes.append([parameter.shape for parameter in model.parameters()])
    assert shapes[0] == shapes[1]


def test_bad_seeds():
    with pytest.raises(ArgumentError):
        RandomImportance(-1)
    with pytest.raises(ArgumentTypeError):
        RandomImportance(0.5)
