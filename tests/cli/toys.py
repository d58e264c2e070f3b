"""Models and data for ``--model`` and ``--data``, as a user's module would hold them."""

from __future__ import annotations

import torch
from torch import nn

CLASSES = 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def make_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 6, generator=generator)
    return list(zip(inputs.split(10), inputs[:, :CLASSES].argmax(1).split(10), strict=True))


def make_generator():
    yield from make_batches()


def make_unlabelled() -> list[tuple[torch.Tensor, None]]:
    return [(inputs, None) for inputs, _ in make_batches()]


def make_images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(12, 3, 64, 64, generator=generator)
    return list(zip(images.split(4), torch.arange(12).split(4), strict=True))


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(inputs).relu()).relu())


def make_text() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(50, (8, 10), generator=generator)
    return [{"input_ids": part, "labels": part} for part in tokens.split(4)]


class NoModel:
    pass


not_callable = 3
