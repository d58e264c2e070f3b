"""Baselines of SNIP-it that prune by a penalty, or rank weights and units jointly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchprune_bayes import structured
from torchprune_bayes.experiments.description import Started, Target
from torchprune_bayes.experiments.trial import Trial
from torchprune_bayes.structured import shrink
from torchprune_bayes.training import (
    TickTock,
    attach_l0_gates,
    expected_l0,
    fold_l0_gates,
    group_hoyer_square,
    hoyer_square,
    keep_sparse,
)
from torchprune_bayes.types import ParameterPairs

_CLOSED = 1e-12


@dataclass(frozen=True)
class Decorated:
    """Gate decorators: ticks and tocks, the cut, and fine-tuning.

    Attributes:
        tick: Epochs of a tick, at full scale.
        tock: Epochs of a tock, at full scale.
        increment: Fraction of the gates that an epoch of a tick closes, at full scale.
        tune: Epochs of fine-tuning, at full scale.
        strength: Factor of the penalty.
    """

    tick: int = 10
    tock: int = 10
    increment: float = 0.05
    tune: float = 10
    strength: float = 1e-3

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Close, cut and fine-tune a network that was trained."""
        assert target is not None
        model = started.model
        shorter = max(1.0, self.tick / trial.epochs(self.tick))
        tick_tock = TickTock(
            *(model, target),
            increment=min(self.increment * shorter, 1.0),
            tick=trial.epochs(self.tick),
            tock=trial.epochs(self.tock),
            strength=self.strength,
        )
        training = trial.training(model)
        while tick_tock.phase != "done":
            with tick_tock.epoch():
                training.epoch(penalty=tick_tock.penalty)
        tick_tock.cut(trial.example())
        tuning = trial.training(model, self.tune)
        tuning.run()
        started.flops += training.flops.total + tuning.flops.total
        return model


@dataclass(frozen=True)
class Penalised:
    """A training with a Hoyer penalty; whatever has become small is pruned.

    Attributes:
        strength: Factor of the penalty.
        units: Whether whole rows are penalised, and units removed; otherwise single weights.
        before: Epochs before pruning, at full scale.
        threshold: Largest absolute value that counts as small.
        tune: Epochs of training after pruning, at full scale.
    """

    strength: float
    units: bool = True
    before: float = 70
    threshold: float = 1e-3
    tune: float = 10

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Train, cut or prune, and fine-tune."""
        model, params = started.model, trial.prunable(started.model)
        penalty = group_hoyer_square if self.units else hoyer_square
        training = trial.training(model, self.before)
        training.run(penalty=lambda: self.strength * penalty(params))
        if self.units:
            importance = structured.LargestWeightImportance(threshold=self.threshold)
            shrink(model, trial.example(), importance, target="evidence")
        tuning = trial.training(model, self.tune)
        if not self.units:
            keep_sparse(tuning.optimizer, _small_to_zero(params, self.threshold))
        tuning.run()
        started.flops += training.flops.total + tuning.flops.total
        return model


@dataclass(frozen=True)
class L0Gates:
    """Hard-concrete gates on units, the closed ones removed in the end.

    Attributes:
        strength: Factor of the expected number of weights, divided by the number of examples.
    """

    strength: float = 1.0

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Train with gates and cut."""
        model = started.model
        gates = attach_l0_gates(model, trial.example())
        training = trial.training(model)
        factor = self.strength / len(trial.data.train)

        def constrain() -> None:
            for gate in gates:
                gate.constrain()

        training.run(penalty=lambda: factor * expected_l0(model), after_step=constrain)
        fold_l0_gates(model)
        shrink(
            model,
            trial.example(),
            structured.LargestWeightImportance("any", _CLOSED),
            target="evidence",
        )
        started.flops += training.flops.total
        return model


@dataclass(frozen=True)
class WeightsAndUnits:
    """CNIP-it before training.

    Attributes:
        samples: Calibration samples at full scale.
        stepwise: Whether to follow the path of SNIP-it.
    """

    samples: int = 2560
    stepwise: bool = True

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Prune, cut and train."""
        assert target is not None
        model = started.model
        weights_report = structured.prune_weights_and_units(
            *(model, trial.example(), lambda model: trial.calibration(model, self.samples)),
            target,
            steps=5 if self.stepwise else 0,
        )
        training = trial.training(model)
        masks = {model.get_parameter(name): mask for name, mask in weights_report.masks.items()}
        keep_sparse(training.optimizer, masks)
        training.run()
        started.flops += training.flops.total
        return model


def _small_to_zero(params: ParameterPairs, threshold: float) -> dict[Tensor, Tensor]:
    """Set small weights to zero; masks of the others by tensor."""
    masks = {}
    with torch.no_grad():
        for module, name in params:
            weight = getattr(module, name)
            masks[weight] = weight.abs() > threshold
            weight.mul_(masks[weight])
    return masks
