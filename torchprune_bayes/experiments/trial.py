"""One seed of an experiment: data, scale, and how its networks are built and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes._checks import check_count, check_positive
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.description import Experiment
from torchprune_bayes.experiments.examples import Split
from torchprune_bayes.experiments.texts import load_classifier
from torchprune_bayes.experiments.training import Training
from torchprune_bayes.params import prunable_parameters
from torchprune_bayes.reports import ResultsTable, evaluate
from torchprune_bayes.types import ParameterPairs

_FEWEST_SAMPLES, _FEWEST_IMAGES = 32, 64  # at any scale


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch in the body; afterwards its generators are restored."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Setting:
    """Scale of an experiment, and what it runs on.

    Attributes:
        scale: Share of the epochs and of the calibration samples, up to 1; below one epoch that
            share of the training examples.
        width: Share of the channels of each layer, up to 1.
        size: Height and width of images instead of the experiment's.
        seeds: How many seeds.
        device: Device of the networks.
        load: Puts trained weights into a new network, instead of a training.
        model: Name or folder of a published model, instead of the experiment's.
        masks: File of masks for rows that take them, see
            :class:`~torchprune_bayes.experiments.weights.SavedMasks`.
        matched: Rows of an earlier run, whose compression is matched.
        tuning: Whether a fifth of the training examples is held out and measured on, instead
            of the test set, which is not used.
        random_labels: Whether the labels of the training examples are drawn at random.

    Raises:
        ArgumentError: If a value is out of range.
    """

    scale: float = 1.0
    width: float = 1.0
    size: int | None = None
    seeds: int = 1
    device: str = "cpu"
    load: Callable[[nn.Module], object] | None = None
    model: str | None = None
    masks: Path | None = None
    matched: ResultsTable | None = None
    tuning: bool = False
    random_labels: bool = False

    def __post_init__(self) -> None:
        for name in ("scale", "width"):
            value = getattr(self, name)
            check_positive(f"--{name}", value)
            if value > 1:
                raise ArgumentError(f"Expected `--{name}` of at most 1, got {value:g}.")
        check_count("--seeds", self.seeds)
        if self.size is not None:
            check_count("--image-size", self.size, minimum=8)


@dataclass(frozen=True)
class Trial:
    """One seed of an experiment.

    Attributes:
        experiment: The experiment.
        setting: Its scale.
        data: Training and test examples.
        seed: The seed.
        facts: Completed rows of this seed by label, for rows that match them.
    """

    experiment: Experiment
    setting: Setting
    data: Split
    seed: int
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def training_seed(self) -> int:
        """The seed of the network's own training."""
        return 0 if self.experiment.one_network else self.seed

    def network(self) -> nn.Module:
        """A new network, in evaluation mode."""
        with seeded(self.training_seed):
            shape, classes = self.data.shape, self.data.classes
            if self.experiment.hub is None:
                model = self.experiment.network(shape, classes, self.setting.width)
            else:
                model = load_classifier(self.setting.model or self.experiment.hub, classes)
        return model.to(self.setting.device).eval()

    def epochs(self, full: float) -> int:
        """Epochs at this scale; at least one."""
        return max(1, round(full * self.setting.scale))

    def samples(self, full: int) -> int:
        """Calibration samples at this scale."""
        scaled = max(_FEWEST_SAMPLES, round(full * self.setting.scale))
        return min(scaled, full, len(self.data.train))

    def training(
        self,
        model: nn.Module,
        epochs: float | None = None,
        *,
        rate: float = 1.0,
        groups: Iterable[Any] | None = None,
    ) -> Training:
        """A training of so many epochs at full scale, by default those of the recipe.

        Where this is less than one epoch at this scale, a part of the examples is used.
        """
        recipe = self.experiment.recipe
        full = (recipe.epochs if epochs is None else epochs) * self.setting.scale
        share = min(full, 1.0) if self.setting.scale < 1 else 1.0
        data = self.data.train.first(max(_FEWEST_IMAGES, round(len(self.data.train) * share)))
        return Training(model, data, recipe, max(1, round(full)), groups=groups, rate=rate)

    def calibration(self, model: nn.Module, samples: int, **options: Any) -> Calibration:
        """Gradients of training examples without augmentation."""
        loader = self.data.train.loader(512, shuffle=True)
        return Calibration(
            model.eval(),
            loader,
            cross_entropy,
            **{"params": self.prunable(model), **options},
            num_samples=self.samples(samples),
            seed=self.seed,
        )

    def measured(self, model: nn.Module) -> float:
        """Accuracy in percent on the test examples."""
        return 100.0 * evaluate(model, self.data.test.loader(500, shuffle=False)).accuracy

    def example(self, samples: int = 2) -> Any:
        """Inputs to trace a network with, on its device."""
        return self.data.train.example(samples).to(self.setting.device)

    def prunable(self, model: nn.Module) -> ParameterPairs:
        """The weights that the experiment prunes."""
        return prunable_parameters(model, exclude=self.experiment.exclude)
