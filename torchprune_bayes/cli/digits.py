"""Built-in data and model: 1797 real 8 x 8 images of digits, embedded in scikit-learn.

Nothing is downloaded. The split is fixed; a seed changes the network and the draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchprune_bayes._extras import optional

_SPLIT = (1000, 300, 497)  # training, validation, test images
_SPLIT_SEED = 0
_LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Images:
    """Images ``[N, 1, 8, 8]`` in [0, 1], float32, and labels ``[N]``, int64."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """One batch of the images at ``indices``."""
        return self.inputs[indices], self.labels[indices]

    def batches(self, size: int = 256) -> list[tuple[Tensor, Tensor]]:
        """All images in order, in batches of at most ``size``."""
        return [self.at(indices) for indices in torch.arange(len(self)).split(size)]


@dataclass(frozen=True)
class Digits:
    """The three parts of the data, disjoint and the same in every run."""

    train: Images
    validation: Images
    test: Images


@cache
def load_digits() -> Digits:
    """Load the images and split them.

    Raises:
        MissingExtraError: If scikit-learn is not installed.

    Example:
        >>> digits = load_digits()
        >>> len(digits.train), len(digits.validation), len(digits.test)
        (1000, 300, 497)
    """
    with optional("scikit-learn", "cli"):
        from sklearn import datasets
    raw: Any = datasets.load_digits()
    inputs = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    return Digits(*(Images(inputs[part], labels[part]) for part in order.split(_SPLIT)))


class CalibrationDigits:
    """Training images in a random order for gradients, then the validation images.

    Methods take gradients from training images, as in the papers; what they choose on held-out
    loss (damping, step sizes) they choose on images that neither training nor gradients saw. The
    order follows torch's global seed, which a ``Calibration`` sets for each of its passes.

    Args:
        digits: The data.
        num_samples: Training images before the validation images follow.
    """

    def __init__(self, digits: Digits, num_samples: int) -> None:
        self._digits = digits
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        train = self._digits.train
        yield train.at(torch.randperm(len(train))[: self.num_samples])
        yield from self._digits.validation.batches()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: such small networks are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def network() -> nn.Sequential:
    """An untrained convolutional network with 3784 prunable weights for the digits.

    Example:
        >>> network()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


def trained_network(seed: int = 0, epochs: int = 10, batch_size: int = 50) -> nn.Sequential:
    """A network trained on the training images; the same seed gives the same weights.

    Args:
        seed: Seeds initialisation and batches; torch's global seed is not changed.
        epochs: Passes over the training images.
        batch_size: Images per step.

    Returns:
        The network in eval mode; its test accuracy is about 97 %.

    Cost: about two seconds on one core.
    """
    train = load_digits().train
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network().train()
        steps = epochs * -(-len(train) // batch_size)
        optimizer = torch.optim.Adam(model.parameters(), _LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
        for _ in range(epochs):
            for indices in torch.randperm(len(train)).split(batch_size):
                inputs, labels = train.at(indices)
                optimizer.zero_grad()
                cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                schedule.step()
    return model.eval()
