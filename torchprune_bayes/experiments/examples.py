"""Labelled examples in memory, and their split for training and measuring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

_HELD_OUT = 0.2


@dataclass(frozen=True)
class Examples:
    """Labelled inputs in memory, indexed a batch at a time.

    Attributes:
        inputs: ``[n, ...]``.
        labels: ``[n]``, int64.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def loader(self, batch_size: int, *, shuffle: bool) -> DataLoader[Any]:
        """Batches of ``(inputs, labels)``, in a new random order each time or in stored order."""
        data = TensorDataset(self.inputs, self.labels)
        order = RandomSampler(data) if shuffle else SequentialSampler(data)
        return DataLoader(data, sampler=BatchSampler(order, batch_size, False), batch_size=None)

    def example(self, samples: int) -> Tensor:
        """The first inputs."""
        return self.inputs[:samples]

    def subset(self, index: Tensor) -> Examples:
        """The examples at positions ``index``."""
        return Examples(self.inputs[index], self.labels[index])

    def first(self, count: int) -> Examples:
        """``count`` examples spread over all of them, or all."""
        if count >= len(self):
            return self
        return self.subset(torch.arange(count) * len(self) // count)

    def labelled(self, labels: Tensor) -> Examples:
        """The same inputs with other labels."""
        return replace(self, labels=labels)


@dataclass(frozen=True)
class Split:
    """Examples for training and for measuring.

    Attributes:
        train: Examples to train and to calibrate on.
        test: Examples to measure on.
        classes: Number of classes.
    """

    train: Any
    test: Any
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.train.example(1).shape[1:])

    def held_out(self, seed: int = 0) -> Split:
        """A fifth of the training examples instead of the test set."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator)
        count = max(1, round(_HELD_OUT * len(order)))
        kept, out = self.train.subset(order[count:]), self.train.subset(order[:count])
        return replace(self, train=kept, test=out)

    def with_random_labels(self, seed: int = 0) -> Split:
        """Training labels drawn at random (`Zhang et al. <https://arxiv.org/abs/1611.03530>`_)."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(self.classes, (len(self.train),), generator=generator)
        return replace(self, train=self.train.labelled(labels))
