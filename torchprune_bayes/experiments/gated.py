"""Training with noise gates (BMRS): closing gates during or after training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprune_bayes import structured
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.experiments.description import Started, Target
from torchprune_bayes.experiments.trial import Trial, seeded
from torchprune_bayes.gates import attach_gates, choose_closed, fold_gates, gates_of
from torchprune_bayes.reports import (
    ResultsTable,
    compression_curve,
    plot_accuracy_against_compression,
    plot_gate_means,
)
from torchprune_bayes.structured import shrink
from torchprune_bayes.training import GateTraining, gate_parameter_groups

TUNING = 10
"""Epochs of the paper's fine-tuning."""


@dataclass(frozen=True)
class Gates:
    """Where gates are placed and how they learn.

    Attributes:
        multiplier: Their learning rate, in units of that of the weights.
        kl: Scale of their penalty, see :class:`~torchprune_bayes.training.GateTraining`.
        residual: Whether residual streams have gates, as in the paper's ResNets.
    """

    multiplier: float = 10.0
    kl: str = "mean"
    residual: bool = True

    def attach(self, model: nn.Module, trial: Trial, **options: Any) -> GateTraining:
        """Put gates into a model; ``trial`` is the one of the training part of the data."""
        attach_gates(model, "auto", trial.example(), residual=self.residual)
        return GateTraining(model, data_size=len(trial.data.train), kl=self.kl, **options)

    def train(
        self, gating: GateTraining, trial: Trial, model: nn.Module, epochs: float | None = None
    ) -> int:
        """Train a model with gates; returns its cost in FLOPs."""
        groups = gate_parameter_groups(
            model, trial.experiment.recipe.rate, multiplier=self.multiplier
        )
        training = trial.training(model, epochs, groups=groups)
        for _ in range(training.epochs):
            training.epoch(penalty=gating.penalty, after_step=gating.step)
            gating.end_epoch(trial.measured(model))
        return training.flops.total


@dataclass(frozen=True)
class Gated:
    """Train with gates, close those that a criterion selects, fine-tune, and shrink.

    Attributes:
        criterion: Name of a criterion.
        continuous: Whether gates close after each epoch; otherwise once, after the training.
        matched: Label of a row whose number of closed gates replaces a threshold.
        gates: Where gates are placed and how they learn.
    """

    criterion: str
    continuous: bool = True
    matched: str | None = None
    gates: Gates = dataclasses.field(default_factory=Gates)

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Train, close and remove gates; ``started.facts`` gets the percentage closed."""
        model, inner = started.model, _with_validation(trial)
        options: dict[str, Any] = {"prune_every": 1 if self.continuous else None}
        if self.matched is not None:
            matched = trial.setting.matched
            rows = trial.facts.values() if matched is None else matched
            closed = closed_in(rows, self.matched, trial.seed)
            options = {"prune_every": None, "amount": closed / 100.0, "beyond": True}
        gating = self.gates.attach(model, inner, criterion=self.criterion, **options)
        started.flops += self.gates.train(gating, inner, model)
        gating.begin_finetuning()
        started.flops += self.gates.train(gating, inner, model, TUNING)
        gating.restore_best()
        gates = gates_of(model)
        started.facts["closed"] = 100.0 * gates.closed / gates.units
        importance = structured.BMRSImportance(gates, criterion=None)
        fold_gates(model)
        shrink(model, trial.example(), importance, target="evidence")
        return model


def closed_in(rows: Iterable[Mapping[str, Any]], label: str, seed: int | None = None) -> float:
    """Percentage of the gates closed in the row of a label, of this seed if present.

    Raises:
        ArgumentError: If there is no such row.
    """
    matching = [row for row in rows if row.get("label") == label and "closed" in row]
    same = [row for row in matching if row.get("seed") == seed]
    if not matching:
        raise ArgumentError(
            f"Expected a row `{label}` with the column `closed` to match, got none: pass a "
            "reproduce.json of this experiment with --matched."
        )
    return float((same or matching)[0]["closed"])


@dataclass(frozen=True)
class GateTrained:
    """A training whose gates are not closed."""

    gates: Gates = dataclasses.field(default_factory=Gates)

    def make(self, trial: Trial) -> Started:
        """Train the network; it keeps its gates."""
        model, inner = trial.network(), _with_validation(trial)
        with seeded(trial.training_seed):
            gating = self.gates.attach(model, inner, prune_every=None)
            flops = self.gates.train(gating, inner, model)
            gating.restore_best()
        return Started(model, flops)


@dataclass(frozen=True)
class PostTraining:
    """Accuracy against compression after training, with the stopping points of the evidence.

    Attributes:
        criteria: Names of criteria.
        levels: Levels of compression at full scale.
        name: Name of the files.
    """

    criteria: tuple[str, ...] = ("bmrs-n", "bmrs-u8", "bmrs-u4", "snr", "l2")
    levels: int = 100
    name: str = "accuracy_against_compression"
    start: GateTrained = dataclasses.field(default_factory=GateTrained)

    def rows(self, trial: Trial, started: Started) -> list[dict[str, Any]]:
        """A row for each criterion and level; only evidence has a stopping point."""
        inner = _with_validation(trial)

        def tune(model: nn.Module) -> None:
            inner.training(model, 1).run()

        points = []
        for criterion in self.criteria:
            curve = compression_curve(
                *(started.model, trial.measured, criterion),
                levels=max(3, round(self.levels * trial.setting.scale)),
                finetune=tune,
                example_inputs=trial.example(),
            )
            kept = (row for row in curve if not row["stop"] or criterion.startswith("bmrs"))
            points += [{"criterion": criterion, "seed": trial.seed, **row} for row in kept]
        return points

    def draw(self, rows: ResultsTable, folder: Path) -> Path:
        """Draw the curves of all seeds."""
        return plot_accuracy_against_compression(rows, folder / f"{self.name}.png")


@dataclass(frozen=True)
class GateHistogram:
    """Histogram of the posterior means of the gates, and of those that a criterion keeps.

    Attributes:
        criterion: Name of the criterion.
        name: Name of the files.
    """

    criterion: str = "bmrs-n"
    name: str = "gate_means"
    start: GateTrained = dataclasses.field(default_factory=GateTrained)

    def rows(self, trial: Trial, started: Started) -> list[dict[str, Any]]:
        """A row for each gate: its mean, and whether it is kept."""
        gates = gates_of(started.model)
        chosen = choose_closed(gates.margins(self.criterion), gates.masks)
        with torch.no_grad():
            return [
                {"site": name, "seed": trial.seed, "mean": mean, "kept": int(not closes)}
                for name, gate in gates.items()
                for mean, closes in zip(
                    gate.posterior.mean().tolist(), chosen[name].tolist(), strict=True
                )
            ]

    def draw(self, rows: ResultsTable, folder: Path) -> Path:
        """Draw the gates of all seeds."""
        return plot_gate_means(rows, folder / f"{self.name}.png")


def _with_validation(trial: Trial) -> Trial:
    """The trial with a fifth of its training examples to measure on."""
    return dataclasses.replace(trial, data=trial.data.held_out(trial.seed))
