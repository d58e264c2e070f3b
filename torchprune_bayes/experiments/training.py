"""One plain training loop for all experiments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from torchprune_bayes.experiments.description import Decay, Recipe
from torchprune_bayes.experiments.examples import Examples
from torchprune_bayes.training import TrainingFlops

Penalty = Callable[[], Tensor]


class Training:
    """A model, its optimizer and its data; :meth:`epoch` goes through the data once.

    Args:
        model: Trained in place; its parameters may be replaced between epochs.
        data: Labelled examples.
        recipe: Optimizer, rates and augmentation.
        epochs: Number of epochs of the learning-rate schedule.
        groups: Parameter groups for the optimizer; by default all parameters.
        rate: Factor on the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Examples,
        recipe: Recipe,
        epochs: int,
        *,
        groups: Iterable[Any] | None = None,
        rate: float = 1.0,
    ) -> None:
        self.model, self.recipe, self.epochs = model, recipe, epochs
        self._data = data
        self._loader = data.loader(recipe.batch_size, shuffle=True)
        self.steps_per_epoch = len(self._loader)
        self.optimizer = _optimizer(recipe, model.parameters() if groups is None else groups, rate)
        self._rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_rate)
        self.flops = TrainingFlops(data.example(1))

    @property
    def steps(self) -> int:
        """Updates of the whole training."""
        return self.epochs * self.steps_per_epoch

    def epoch(
        self,
        *,
        penalty: Penalty | None = None,
        after_backward: Callable[[], object] | None = None,
        after_step: Callable[[], object] | None = None,
    ) -> None:
        """One pass over the data; ``penalty`` is added to the loss of each batch."""
        self.flops.add(self.model, len(self._data))
        self.model.train()
        for inputs, targets in self._batches():
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(inputs), targets)
            (loss if penalty is None else loss + penalty()).backward()
            if self.recipe.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
            if after_backward is not None:
                after_backward()
            self.optimizer.step()
            self._rate.step()
            if after_step is not None:
                after_step()
        self.model.eval()

    def run(self, epochs: int | None = None, **hooks: Any) -> None:
        """Several epochs, by default all."""
        for _ in range(self.epochs if epochs is None else epochs):
            self.epoch(**hooks)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(self.model.parameters()).device
        for inputs, targets in self._loader:
            x = _augmented(inputs.to(device), self.recipe)
            yield x, targets.to(device)

    def _share_of_rate(self, step: int) -> float:
        schedule = self.recipe.schedule
        progress = step / max(self.steps, 1)
        if schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
        if isinstance(schedule, Decay):
            epoch = progress * self.recipe.epochs
            last = min(epoch, schedule.end)
            times = 0 if epoch < schedule.begin else 1 + (last - schedule.begin) // schedule.every
            return float(schedule.factor**times)
        return 1.0


def _optimizer(recipe: Recipe, parameters: Iterable[Any], rate: float) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": recipe.rate * rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=recipe.momentum, **options)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **options)


def _augmented(x: Tensor, recipe: Recipe) -> Tensor:
    """Images that are mirrored and shifted, independently; other inputs are unchanged."""
    if x.ndim != 4:
        return x
    if recipe.flip:
        flipped = torch.rand(len(x), 1, 1, 1, device=x.device) < recipe.flip
        x = torch.where(flipped, x.flip(3), x)
    if recipe.crop:
        height, width = x.shape[2:]
        padded = pad(x, [recipe.crop] * 4)
        shifts = torch.randint(2 * recipe.crop + 1, (len(x), 2), device=x.device)
        rows = shifts[:, :1] + torch.arange(height, device=x.device)
        columns = shifts[:, 1:] + torch.arange(width, device=x.device)
        index = torch.arange(len(x), device=x.device)[:, None, None]
        x = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
        x = x.permute(0, 3, 1, 2)
    return x
