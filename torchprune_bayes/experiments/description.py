"""What an experiment of a paper is: its network, data, training, rows and published numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from torch import nn

from torchprune_bayes.experiments.networks import mlpnet

if TYPE_CHECKING:
    from torchprune_bayes.experiments.trial import Trial
    from torchprune_bayes.laplace import Posterior
    from torchprune_bayes.reports import ResultsTable

Target: TypeAlias = float | None
"""A sparsity in [0, 1), or ``None`` where the method itself says how much goes."""

Network: TypeAlias = Callable[[tuple[int, ...], int, float], nn.Module]
"""Makes a network from the shape of an input, the number of classes and a share of its widths."""


@dataclass(frozen=True)
class Decay:
    """A learning rate that is multiplied by ``factor`` at the ends of some epochs.

    Attributes:
        begin: Epoch of the first time.
        end: Epoch of the last time.
        every: Epochs in between.
        factor: What the rate is multiplied by.
    """

    begin: float
    end: float
    every: float
    factor: float


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: Epochs of the whole training at full scale.
        optimizer: Which optimizer.
        rate: Its learning rate.
        batch_size: Samples of an update.
        schedule: Of the learning rate.
        momentum: Of SGD.
        weight_decay: Coupled for SGD and Adam, decoupled for AdamW.
        clip: Largest norm of the gradient; ``None`` for any.
        flip: Share of the images that are mirrored.
        crop: Pixels by which images are shifted at most.
    """

    epochs: int
    optimizer: Literal["sgd", "adam", "adamw"]
    rate: float
    batch_size: int
    schedule: Literal["constant", "cosine"] | Decay = "constant"
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    flip: float = 0.0
    crop: int = 0


@dataclass(frozen=True)
class Published:
    """Numbers of a paper; ``None`` for what was not published or could not be looked up.

    Attributes:
        accuracy: Test accuracy in percent.
        drop: Points of accuracy lost against the dense network.
        compression: Percentage of the parameters that are gone.
        training_flops: FLOPs of the training in percent of those of the dense one.
    """

    accuracy: float | None = None
    drop: float | None = None
    compression: float | None = None
    training_flops: float | None = None


UNKNOWN = Published()
"""Nothing was published, or what was could not be looked up."""


def accuracies(found: Mapping[float, float]) -> dict[Target, Published]:
    """Published accuracies by sparsity.

    Example:
        >>> accuracies({0.9: 90.3})[0.9].accuracy
        90.3
    """
    return {sparsity: Published(accuracy) for sparsity, accuracy in found.items()}


def without_numbers(*targets: Target) -> dict[Target, Published]:
    """Targets for which there is nothing published to compare with."""
    return dict.fromkeys(targets, UNKNOWN)


@dataclass
class Started:
    """A network to prune, and what its training left.

    Attributes:
        model: The network.
        flops: FLOPs of its training so far.
        posterior: Of a training by the marginal likelihood.
        facts: Further columns of the row, put here while it is pruned.
    """

    model: nn.Module
    flops: int = 0
    posterior: Posterior | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Start(Protocol):
    """What happens before pruning; equal ones share what they have made."""

    def make(self, trial: Trial) -> Started:
        """Make the network."""


class Pruning(Protocol):
    """One way to prune, from the network that its start has made to the one that is measured."""

    @property
    def is_random(self) -> bool:
        """Whether draws of calibration samples matter."""

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Prune, and train as much as belongs to it; returns the network to measure."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: What the table calls it.
        start: What happens before.
        pruning: What is done.
        published: The paper's numbers for each target; the targets are those that are run.
    """

    label: str
    start: Start
    pruning: Pruning
    published: Mapping[Target, Published]


class Figure(Protocol):
    """A drawing that belongs to an experiment."""

    @property
    def name(self) -> str:
        """The name of its files."""

    @property
    def start(self) -> Start:
        """What is drawn is made of this network."""

    def rows(self, trial: Trial, started: Started) -> list[dict[str, Any]]:
        """What is drawn of one seed."""

    def draw(self, rows: ResultsTable, folder: Path) -> Path:
        """Draw the rows of all seeds into a folder."""


@dataclass(frozen=True)
class Experiment:
    """A table of a paper.

    Attributes:
        title: What it is about.
        paper: Where it was published.
        data: Name of the data, see :data:`~torchprune_bayes.experiments.data.SOURCES`.
        recipe: How the network is trained.
        rows: What is compared.
        network: Makes the network.
        hub: Name of a published transformer, in the place of the network.
        dense: The paper's numbers for the network as it is.
        differs: Where the original, or what is done here, differs from the description.
        size: Height and width that images are brought to; ``None`` leaves them as they are.
        exclude: Names of modules whose weights are not pruned.
        one_network: Whether seeds draw calibration samples for one network; else each seed is a
            training of its own.
        figures: Drawings.
    """

    title: str
    paper: str
    data: str
    recipe: Recipe
    rows: tuple[Row, ...]
    network: Network = mlpnet
    hub: str | None = None
    dense: Published = UNKNOWN
    differs: str = ""
    size: int | None = None
    exclude: tuple[str, ...] = ()
    one_network: bool = False
    figures: tuple[Figure, ...] = ()
