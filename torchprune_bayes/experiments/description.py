"""Description of a paper's experiment: network, data, training, rows and published numbers."""

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
    """A learning rate that is multiplied by ``factor`` after some epochs.

    Attributes:
        begin: Epoch of the first reduction.
        end: Epoch of the last reduction.
        every: Epochs between reductions.
        factor: Factor of the rate.
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
        optimizer: Name of the optimizer.
        rate: Its learning rate.
        batch_size: Samples of an update.
        schedule: Schedule of the learning rate.
        momentum: Momentum of SGD.
        weight_decay: Coupled for SGD and Adam, decoupled for AdamW.
        clip: Largest norm of the gradient; ``None`` for no limit.
        flip: Fraction of the images that are mirrored.
        crop: Largest shift of images, in pixels.
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
        compression: Percentage of the parameters that are removed.
        training_flops: FLOPs of the training in percent of those of the dense one.
    """

    accuracy: float | None = None
    drop: float | None = None
    compression: float | None = None
    training_flops: float | None = None


UNKNOWN = Published()
"""Nothing was published, or what was could not be looked up."""


def accuracies(by_sparsity: Mapping[float, float]) -> dict[Target, Published]:
    """Published accuracies by sparsity.

    Example:
        >>> accuracies({0.9: 90.3})[0.9].accuracy
        90.3
    """
    return {sparsity: Published(accuracy) for sparsity, accuracy in by_sparsity.items()}


def without_numbers(*targets: Target) -> dict[Target, Published]:
    """Targets for which there is nothing published to compare with."""
    return dict.fromkeys(targets, UNKNOWN)


@dataclass
class Started:
    """A network to prune, and the results of its training.

    Attributes:
        model: The network.
        flops: FLOPs of its training so far.
        posterior: Posterior of a training with the marginal likelihood.
        facts: Further columns of the row, set while it is pruned.
    """

    model: nn.Module
    flops: int = 0
    posterior: Posterior | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Start(Protocol):
    """Preparation before pruning; equal ones share their result."""

    def make(self, trial: Trial) -> Started:
        """Make the network."""
        ...


class Pruning(Protocol):
    """One way to prune, from the network of its start to the one that is measured."""

    @property
    def is_random(self) -> bool:
        """Whether draws of calibration samples matter."""
        ...

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Prune, train as it prescribes; returns the network to measure."""
        ...


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: Name in the table.
        start: Preparation before pruning.
        pruning: How the network is pruned.
        published: The paper's numbers for each target; these targets are run.
    """

    label: str
    start: Start
    pruning: Pruning
    published: Mapping[Target, Published]


class Figure(Protocol):
    """A figure of an experiment."""

    @property
    def name(self) -> str:
        """Name of its files."""
        ...

    @property
    def start(self) -> Start:
        """The preparation of the network that is drawn."""
        ...

    def rows(self, trial: Trial, started: Started) -> list[dict[str, Any]]:
        """Data of one seed."""
        ...

    def draw(self, rows: ResultsTable, folder: Path) -> Path:
        """Draw the rows of all seeds into a folder."""
        ...


@dataclass(frozen=True)
class Experiment:
    """A table of a paper.

    Attributes:
        title: Subject of the table.
        paper: The publication.
        data: Name of the data, see :data:`~torchprune_bayes.experiments.data.SOURCES`.
        recipe: How the network is trained.
        rows: What is compared.
        network: Builds the network.
        hub: Name of a published transformer, instead of the network.
        dense: The paper's numbers for the dense network.
        differs: Differences of the original code, or of this one, from the paper.
        size: Height and width that images are resized to; ``None`` does not resize.
        exclude: Names of modules whose weights are not pruned.
        one_network: Whether seeds draw calibration samples for one network; otherwise each seed is
            a separate training.
        figures: Its figures.
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
