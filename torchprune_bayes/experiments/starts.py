"""Preparation of a network before it is pruned."""

from __future__ import annotations

from dataclasses import dataclass

from torchprune_bayes.experiments.description import Started
from torchprune_bayes.experiments.trial import Trial, seeded


@dataclass(frozen=True)
class Untrained:
    """Random weights, or given ones."""

    def make(self, trial: Trial) -> Started:
        """Make the network."""
        return Started(trial.network())


@dataclass(frozen=True)
class Trained:
    """A training by the recipe, or given weights.

    Attributes:
        epochs: Epochs at full scale; those of the recipe by default.
    """

    epochs: float | None = None

    def make(self, trial: Trial) -> Started:
        """Make and train the network."""
        model = trial.network()
        if trial.setting.load is not None:
            trial.setting.load(model)
            return Started(model)
        with seeded(trial.training_seed):
            training = trial.training(model, self.epochs)
            training.run()
        return Started(model, training.flops.total)
