"""One engine for all experiments: load, start, prune, measure, and add the paper's numbers."""

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
    """The data of an experiment, at a setting.

    Raises:
        ArgumentError: If the folder has another layout.
        MissingExtraError: If a package that reads them is not installed.
    """
    model = setting.model or experiment.hub
    data = SOURCES[experiment.data](root, setting.size or experiment.size, model)
    data = data.held_out() if setting.tuning else data
    return data.with_random_labels() if setting.random_labels else data


class Run:
    """An experiment on data, at a setting.

    Args:
        experiment: The experiment.
        data: Training and test examples.
        setting: Its scale.
    """

    def __init__(self, experiment: Experiment, data: Split, setting: Setting) -> None:
        self.experiment, self.setting = experiment, setting
        self._trials = [Trial(experiment, setting, data, seed) for seed in range(setting.seeds)]
        self._made: list[tuple[Start, int, Started]] = []

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Run all rows of all seeds; yields each when it is done.

        Yields:
            ``label``, ``sparsity`` (the target), ``seed``, ``paper`` (accuracy in percent),
            ``ours``; ``paper_drop``, ``paper_compression`` and ``paper_training_flops`` where they
            are published, each with our ``drop``, ``compression`` and ``training_flops``, in
            percent.
        """
        for trial in self._trials if self.experiment.rows else []:
            dense = _Dense(trial, self._started(Trained(), trial))
            if not (self.experiment.one_network and trial.seed):
                yield dense.row()
            for row in self._wanted(trial.seed):
                begin = self._started(row.start, trial)
                for target, published in row.published.items():
                    twin = Started(copy.deepcopy(begin.model), begin.flops, begin.posterior)
                    with seeded(derived_seed(trial.seed, row.label, str(target))):
                        pruned = row.pruning.run(twin, trial, target)
                    cells = dense.compared(row.label, target, published, pruned, twin)
                    trial.facts[row.label] = cells
                    yield cells

    def figures(self, folder: Path) -> list[Path]:
        """Draw all figures; their data are written beside each, as JSON.

        Raises:
            MissingExtraError: If matplotlib is not installed.
        """
        files = []
        for figure in self.experiment.figures:
            rows: list[dict[str, Any]] = []
            for trial in self._trials:
                started = self._started(figure.start, trial)
                with seeded(derived_seed(trial.seed, figure.name)):
                    rows += figure.rows(trial, started)
            table = as_table(rows)
            table.to_json(folder / f"{figure.name}.json")
            files += [folder / f"{figure.name}.json", figure.draw(table, folder)]
        return files

    def _started(self, start: Start, trial: Trial) -> Started:
        for made_from, seed, started in self._made:
            if (made_from, seed) == (start, trial.training_seed):
                return started
        started = start.make(trial)
        self._made.append((start, trial.training_seed, started))
        return started

    def _wanted(self, seed: int) -> Iterator[Row]:
        for row in self.experiment.rows:
            again = self.experiment.one_network and seed and not row.pruning.is_random
            masks = self.setting.masks is not None or not isinstance(row.pruning, SavedMasks)
            if masks and not again:
                yield row


class _Dense:
    """The trained network of a seed, with which the others are compared."""

    def __init__(self, trial: Trial, started: Started) -> None:
        self._trial, self._started = trial, started
        self._accuracy = trial.measured(started.model)
        self._parameters = _remaining(started.model)
        self._flops = self._forward(started.model)

    def row(self) -> dict[str, Any]:
        """The row of the dense network."""
        published = self._trial.experiment.dense
        return self._row(DENSE, 0.0) | {"paper": published.accuracy, "ours": self._accuracy}

    def compared(
        self,
        label: str,
        target: Target,
        published: Published,
        model: nn.Module,
        started: Started,
    ) -> dict[str, Any]:
        """The row of a pruned network, and the state it was pruned from."""
        accuracy = self._trial.measured(model)
        cells = self._row(label, target) | {
            "paper": published.accuracy,
            "ours": accuracy,
            "paper_drop": published.drop,
            "drop": self._accuracy - accuracy,
            "paper_compression": published.compression,
            "compression": 100.0 * (1.0 - _remaining(model) / self._parameters),
            "flops": 100.0 * self._forward(model) / self._flops,
        }
        if self._started.flops and started.flops:
            cells["paper_training_flops"] = published.training_flops
            cells["training_flops"] = 100.0 * started.flops / self._started.flops
        return cells | started.facts

    def _row(self, label: str, target: Target) -> dict[str, Any]:
        return {"label": label, "sparsity": target, "seed": self._trial.seed}

    def _forward(self, model: nn.Module) -> int:
        return TrainingFlops(self._trial.example(1)).add(model, 1)


def _remaining(model: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int((parameter != 0).sum()) for parameter in model.parameters())


def as_table(rows: Iterable[Mapping[str, Any]]) -> ResultsTable:
    """Rows as a table, each without its empty cells."""
    return ResultsTable(
        {name: value for name, value in row.items() if value is not None} for row in rows
    )
