"""One engine for all experiments: load, start, prune, measure, and note the paper's numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from torchprune_bayes.experiments.data import SOURCES
from torchprune_bayes.experiments.description import (
    Experiment,
    Published,
    Row,
    Start,
    Started,
    Target,
)
from torchprune_bayes.experiments.examples import Split
from torchprune_bayes.experiments.starts import Trained
from torchprune_bayes.experiments.trial import Setting, Trial, seeded
from torchprune_bayes.experiments.weights import SavedMasks
from torchprune_bayes.reports import ResultsTable
from torchprune_bayes.seeds import derived_seed
from torchprune_bayes.training import TrainingFlops

DENSE = "dense"
"""The label of the network as it is."""


def load_split(experiment: Experiment, root: Path, setting: Setting) -> Split:
    """The data of an experiment, as the setting wants them.

    Raises:
        ArgumentError: If the folder is laid out otherwise.
        MissingExtraError: If a package that reads them is not installed.
    """
    model = setting.model or experiment.hub
    data = SOURCES[experiment.data](root, setting.size or experiment.size, model)
    data = data.held_out() if setting.tuning else data
    return data.with_random_labels() if setting.random_labels else data


def run_experiment(
    experiment: Experiment, data: Split, setting: Setting
) -> Iterator[Mapping[str, Any]]:
    """Run all rows of all seeds; yields each as it is done.

    Args:
        experiment: What is run.
        data: Training and test examples.
        setting: How much of it.

    Yields:
        ``label``, ``sparsity`` (the target), ``seed``, ``paper`` (accuracy in percent), ``ours``;
        ``paper_drop``, ``paper_compression`` and ``paper_training_flops`` where they are published,
        each with ``drop``, ``compression`` and ``training_flops`` beside it, in percent.
    """
    starts: list[tuple[Start, int, Started]] = []

    def started(start: Start, trial: Trial) -> Started:
        for known, seed, found in starts:
            if (known, seed) == (start, trial.training_seed):
                return found
        found = start.make(trial)
        starts.append((start, trial.training_seed, found))
        return found

    for seed in range(setting.seeds):
        trial = Trial(experiment, setting, data, seed)
        dense = _Dense(trial, started(Trained(), trial))
        if not (experiment.one_network and seed):
            yield trial.facts.setdefault(DENSE, dense.row())
        for row in _rows(experiment, setting, seed):
            begin = started(row.start, trial)
            for target, published in row.published.items():
                twin = Started(copy.deepcopy(begin.model), begin.flops, begin.posterior)
                with seeded(derived_seed(seed, row.label, str(target))):
                    pruned = row.pruning.run(twin, trial, target)
                found = dense.compared(row.label, target, published, pruned, twin.flops)
                trial.facts[row.label] = found
                yield found


def _rows(experiment: Experiment, setting: Setting, seed: int) -> Iterator[Row]:
    for row in experiment.rows:
        again = experiment.one_network and seed and not row.pruning.is_random
        if not again and (setting.masks is not None or not isinstance(row.pruning, SavedMasks)):
            yield row


class _Dense:
    """The trained network of a seed, with which the others are compared."""

    def __init__(self, trial: Trial, started: Started) -> None:
        self._trial, self._started = trial, started
        self._accuracy = trial.measured(started.model)
        self._parameters = _remaining(started.model)
        self._flops = self._forward(started.model)

    def row(self) -> dict[str, Any]:
        """The row of the network as it is."""
        published = self._trial.experiment.dense
        return self._row(DENSE, 0.0) | {"paper": published.accuracy, "ours": self._accuracy}

    def compared(
        self, label: str, target: Target, published: Published, model: nn.Module, flops: int
    ) -> dict[str, Any]:
        """The row of a pruned network, whose training has cost so many FLOPs."""
        accuracy = self._trial.measured(model)
        found = self._row(label, target) | {
            "paper": published.accuracy,
            "ours": accuracy,
            "paper_drop": published.drop,
            "drop": self._accuracy - accuracy,
            "paper_compression": published.compression,
            "compression": 100.0 * (1.0 - _remaining(model) / self._parameters),
            "flops": 100.0 * self._forward(model) / self._flops,
        }
        if self._started.flops and flops:
            found["paper_training_flops"] = published.training_flops
            found["training_flops"] = 100.0 * flops / self._started.flops
        return found

    def _row(self, label: str, target: Target) -> dict[str, Any]:
        return {"label": label, "sparsity": target, "seed": self._trial.seed}

    def _forward(self, model: nn.Module) -> int:
        return TrainingFlops(self._trial.example(1)).add(model, 1)


def _remaining(model: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int((parameter != 0).sum()) for parameter in model.parameters())


def as_table(rows: Iterable[Mapping[str, Any]]) -> ResultsTable:
    """Rows as a table, each without what it does not have."""
    return ResultsTable(
        {name: value for name, value in row.items() if value is not None} for row in rows
    )
