"""Ways to remove whole units: before, during and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from torchprune_bayes import structured
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.description import Started, Target
from torchprune_bayes.experiments.trial import Trial
from torchprune_bayes.experiments.weights import Halving
from torchprune_bayes.structured import shrink
from torchprune_bayes.training import GradualShrinking


@dataclass(frozen=True)
class Importance:
    """An importance by name.

    Attributes:
        name: Its name; ``"opd"`` uses the posterior of the start.
        samples: Calibration samples at full scale, for importances that use data.
    """

    name: Literal["snap-it", "l1", "random", "opd"]
    samples: int = 2560

    def of(self, trial: Trial, started: Started, model: nn.Module) -> Any:
        """Make the importance for a model."""
        if self.name == "snap-it":
            return structured.SNAPitImportance(trial.calibration(model, self.samples))
        if self.name == "random":
            return structured.RandomImportance(trial.seed)
        if self.name == "l1":
            return structured.L1FilterImportance()
        if started.posterior is None:
            raise ArgumentError("Expected a start with a posterior for `opd`, got none.")
        return structured.OPDImportance(started.posterior)


@dataclass(frozen=True)
class Cut:
    """Remove units at once, or along SNIP-it's path, then train.

    Attributes:
        importance: What ranks units.
        stepwise: Whether to follow the path of SNIP-it, with new scores at each of its steps.
        by_layer: Whether all layers lose the same share.
        tune: Epochs of training after it, at full scale; ``None`` for those of the recipe.
        rate: Factor on the learning rate of that training.
    """

    importance: Importance
    stepwise: bool = False
    by_layer: bool = False
    tune: float | None = None
    rate: float = 1.0

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Cut and train."""
        assert target is not None
        model = started.model.eval()
        shrink(
            model,
            trial.example(),
            self.importance.of(trial, started, model),
            sparsity=target,
            target="channels",
            steps=structured.halving_path(target) if self.stepwise else 1,
            allocation="layer" if self.by_layer else "global",
            repair="none",
        )
        training = trial.training(model, self.tune, rate=self.rate)
        training.run()
        started.flops += training.flops.total
        return model


@dataclass(frozen=True)
class CutDuring:
    """Remove units along SNIP-it's course while the network trains.

    Attributes:
        importance: What ranks units, recomputed at each event.
        course: When and how far.
    """

    importance: Importance
    course: Halving

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Train and cut."""
        assert target is not None
        model = started.model
        training = trial.training(model)
        shrinking = GradualShrinking(
            model,
            lambda model: self.importance.of(trial, started, model),
            self.course.schedule(training, target),
            example_inputs=trial.example(),
            optimizer=training.optimizer,
            target="channels",
            allocation="global",
            repair="none",
        )

        def step() -> None:
            if shrinking.step() is not None:
                model.train()

        training.run(after_step=step)
        started.flops += training.flops.total
        return model.eval()
