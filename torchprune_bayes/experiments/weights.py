"""Ways to prune single weights: after, before and during training, and by rewinding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.description import Started, Target
from torchprune_bayes.experiments.training import Training
from torchprune_bayes.experiments.trial import Trial
from torchprune_bayes.layer_kinds import kind_of
from torchprune_bayes.methods import bake, masks_of, prune_global
from torchprune_bayes.schedules import Schedule, halving, polynomial
from torchprune_bayes.training import GradualPruner, IterativeMagnitudePruning, keep_sparse
from torchprune_bayes.types import Masks, ParameterPairs


@dataclass(frozen=True)
class Method:
    """A registered method with the options of a paper.

    Attributes:
        name: The method.
        samples: Calibration samples at full scale; 0 for methods without data.
        mini_batch: Samples of one gradient.
        options: Further options.
    """

    name: str
    samples: int = 0
    mini_batch: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def prunable(self, trial: Trial, model: nn.Module) -> ParameterPairs:
        """The weights that it prunes: the experiment's, restricted to those that fit a pattern."""
        pairs, pattern = trial.prunable(model), self.options.get("pattern")
        if pattern is None:
            return pairs
        group_size = int(pattern.partition(":")[2])
        fitting = [
            (module, name)
            for module, name in pairs
            if getattr(module, name).shape[kind_of(module).input_dim] % group_size == 0
        ]
        if not fitting:
            raise ArgumentError(
                f"Expected a layer whose inputs are a multiple of {group_size} for {pattern}, got "
                "none: use another `--width`."
            )
        return fitting

    def arguments(self, trial: Trial, model: nn.Module) -> dict[str, Any]:
        """Options, with calibration data if the method uses it."""
        if not self.samples:
            return dict(self.options)
        batch = max(1, min(self.mini_batch, trial.samples(self.samples) // 8))
        params = self.prunable(trial, model)
        calibration = trial.calibration(model, self.samples, mini_batch=batch, params=params)
        return {**self.options, "calibration": calibration}


@dataclass(frozen=True)
class OneShot:
    """Prune at once.

    Attributes:
        method: The method.
        tune: Epochs of training after pruning, at full scale.
        rate: Factor on the learning rate of that training.
    """

    method: Method
    tune: float = 0.0
    rate: float = 0.1

    @property
    def is_random(self) -> bool:
        """Whether it uses data, or trains."""
        return bool(self.method.samples or self.tune)

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Prune a network that was trained."""
        model = started.model
        options = self.method.arguments(trial, model)
        if started.posterior is not None and self.method.name == "opd":
            options["posterior"] = started.posterior
        params = self.method.prunable(trial, model)
        prune_global(params, self.method.name, amount=target, **options)
        return trained_on(started, trial, self.tune, self.rate) if self.tune else bake(model)


@dataclass(frozen=True)
class SavedMasks:
    """Load saved masks and only apply CBS's update to the remaining weights."""

    method: Method

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Update the weights that the masks leave.

        Raises:
            ArgumentError: If the file has no masks of these tensors.
        """
        assert trial.setting.masks is not None
        masks = read_masks(trial.setting.masks)
        tensors = dict(started.model.named_parameters())
        if not masks or any(name not in tensors for name in masks):
            raise ArgumentError(
                f"Expected masks of the network in `{trial.setting.masks}`, got "
                f"{', '.join(masks) or 'none'}."
            )
        fixed = {"initial": masks, "max_iterations": 0, "amount": pruned_in(masks)}
        options = self.method.arguments(trial, started.model) | fixed
        prune_global(trial.prunable(started.model), self.method.name, **options)
        return bake(started.model)


def read_masks(path: Path) -> Masks:
    """Boolean masks by name from a safetensors file.

    Raises:
        ArgumentError: If it is not such a file.
    """
    try:
        return {name: mask.bool() for name, mask in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"Expected a file of masks, got `{path}`: {error}.") from error


class Course(Protocol):
    """When and how far a training prunes, in epochs of the full scale."""

    def schedule(self, training: Training, final: float) -> Schedule:
        """The schedule in updates of a training."""
        ...


@dataclass(frozen=True)
class Polynomial:
    """The course of Zhu and Gupta, between two epochs.

    Attributes:
        begin: First epoch.
        end: Last epoch.
        every: Epochs between prunings.
        initial: First sparsity.
        degree: Degree of the polynomial.
    """

    begin: float
    end: float
    every: float
    initial: float = 0.0
    degree: float = 3.0

    def schedule(self, training: Training, final: float) -> Schedule:
        """The schedule in updates of a training."""
        first, last, step = (steps_of(training, x) for x in (self.begin, self.end, self.every))
        return polynomial(
            final, first, max(first, last), max(step, 1), self.initial, degree=self.degree
        )


@dataclass(frozen=True)
class Halving:
    """SNIP-it's course.

    Attributes:
        delay: Epochs without pruning.
        every: Epochs from one event to the next; the first comes this long after the delay.
    """

    delay: float
    every: float

    def schedule(self, training: Training, final: float) -> Schedule:
        """The schedule in updates of a training."""
        step = max(steps_of(training, self.every), 1)
        return halving(final, begin=steps_of(training, self.delay) + step, every=step)


@dataclass(frozen=True)
class During:
    """Prune along a course while the network trains.

    Attributes:
        method: The method.
        course: When and how far.
        decay_after: Whether weight decay continues after the last pruning.
    """

    method: Method
    course: Course
    decay_after: bool = True

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Train and prune."""
        assert target is not None
        model = started.model
        training = trial.training(model)
        pruner = GradualPruner(
            trial.prunable(model),
            self.method.name,
            self.course.schedule(training, target),
            optimizer=training.optimizer,
            decay_after=self.decay_after,
            **self.method.arguments(trial, model),
        )
        training.run(after_step=pruner.step)
        started.flops += training.flops.total
        return model


@dataclass(frozen=True)
class Before:
    """Prune at once, then train by the whole recipe."""

    method: Method

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Prune and train."""
        model = started.model
        options = self.method.arguments(trial, model)
        prune_global(trial.prunable(model), self.method.name, amount=target, **options)
        return trained_on(started, trial, None, 1.0)


@dataclass(frozen=True)
class Rewinding:
    """Iterative magnitude pruning: rounds of training, each rewound to an early epoch.

    Attributes:
        remember: Epochs after which the weights are remembered.
        rounds: Epochs of a round.
    """

    remember: float
    rounds: float

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Train in rounds, then to the end."""
        assert target is not None
        training = trial.training(started.model)
        pruner = IterativeMagnitudePruning(
            *(started.model, halving(target, begin=1, every=1)),
            params=trial.prunable(started.model),
            optimizer=training.optimizer,
            rewind="weights",
        )
        first, length = (
            max(1, round(training.epochs * full / training.recipe.epochs))
            for full in (self.remember, self.rounds)
        )
        training.run(first)
        pruner.remember()
        left = training.epochs - first
        while not pruner.finished:
            training.run(length)
            left -= length
            pruner.prune_and_rewind()
        training.run(max(left, 1))
        started.flops += training.flops.total
        return started.model


def trained_on(started: Started, trial: Trial, epochs: float | None, rate: float) -> nn.Module:
    """Train the remaining weights; pruned ones are kept at zero."""
    model = started.model
    masks = masks_of(model)
    bake(model)
    training = trial.training(model, epochs, rate=rate)
    if masks:
        by_parameter = {model.get_parameter(name): mask for name, mask in masks.items()}
        keep_sparse(training.optimizer, by_parameter)
    training.run()
    started.flops += training.flops.total
    return model


def steps_of(training: Training, epochs: float) -> int:
    """Updates of a training for a number of epochs at full scale."""
    return round(training.steps * epochs / training.recipe.epochs)


def pruned_in(masks: Masks) -> int:
    """Number of entries that masks prune."""
    return sum(int((~mask).sum()) for mask in masks.values())
