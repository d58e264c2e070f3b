"""Small models that the tests of parameters share."""

from __future__ import annotations

from typing import Any

from torch import nn


def two_layers() -> Any:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def tied() -> Any:
    """An embedding, a first layer, and a head that shares the embedding's weight."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    return model
