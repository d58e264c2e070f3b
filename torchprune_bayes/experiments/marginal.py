"""Training with the marginal likelihood (SpaM), and pruning during it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torchprune_bayes.curvature import trainable_parameters
from torchprune_bayes.experiments.description import Started, Target
from torchprune_bayes.experiments.training import Training
from torchprune_bayes.experiments.trial import Trial, seeded
from torchprune_bayes.laplace import Posterior
from torchprune_bayes.schedules import Schedule, linear
from torchprune_bayes.training import SpaM


@dataclass(frozen=True)
class Prior:
    """How the prior is learnt.

    Attributes:
        structure: Structure of the prior: ``"scalar"``, ``"layerwise"``, ``"unitwise"`` or
            ``"diag"``.
        curvature: ``"diagonal"`` or ``"kronecker"``.
        burn_in: Epochs without updates of the prior, at full scale.
        every: Epochs from one update to the next.
        samples: Calibration samples of an update, at full scale.
        learnt: ``False`` keeps the initial prior, the MAP baseline.
    """

    structure: str = "diag"
    curvature: str = "diagonal"
    burn_in: float = 0
    every: float = 5
    samples: int = 60_000
    learnt: bool = True


@dataclass(frozen=True)
class SpaMTrained:
    """A training with the marginal likelihood.

    Attributes:
        prior: How the prior is learnt.
    """

    prior: Prior

    def make(self, trial: Trial) -> Started:
        """Train the network; the posterior is the one at its end."""
        model = trial.network()
        if trial.setting.load is not None:
            trial.setting.load(model)
        with seeded(trial.training_seed):
            training = trial.training(model)
            posterior = train_by_evidence(training, trial, self.prior)
        return Started(model, training.flops.total, posterior)


@dataclass(frozen=True)
class Online:
    """Prune by the posterior during training; pruned weights may regrow, as in the paper.

    Attributes:
        prior: How the prior is learnt.
        mode: ``"opd"`` (the original's ``posterior_and_weights``) or ``"posterior"``.
        every: Epochs from one pruning to the next, at full scale.
        initial: First sparsity.
        regrow: Whether zeros may regrow between two prunings.
    """

    prior: Prior
    mode: str = "opd"
    every: float = 10
    initial: float = 0.1
    regrow: bool = False

    is_random = True

    def run(self, started: Started, trial: Trial, target: Target) -> nn.Module:
        """Train and prune."""
        assert target is not None
        training = trial.training(started.model)
        step = _epochs(training, self.every)
        # The last epoch trains the remaining weights.
        last = max(step, training.epochs - 1)
        schedule = linear(target, step, last, step, min(self.initial, target))
        train_by_evidence(training, trial, self.prior, schedule, self.mode, regrow=self.regrow)
        started.flops += training.flops.total
        return started.model


def train_by_evidence(
    training: Training,
    trial: Trial,
    prior: Prior,
    schedule: Schedule | None = None,
    mode: str = "opd",
    *,
    regrow: bool = False,
) -> Posterior:
    """Complete a training with the prior on weights and biases; returns the posterior."""
    model = training.model
    spam = SpaM(
        training.optimizer,
        trial.calibration(model, prior.samples, params=trainable_parameters(model)),
        prior.structure,
        burn_in=_epochs(training, prior.burn_in) if prior.burn_in else 0,
        every=_epochs(training, prior.every),
        structure=prior.curvature,
        num_data=len(trial.data.train),
        decoupled=trial.experiment.recipe.optimizer == "adamw",
        enabled=prior.learnt,
        schedule=schedule,
        regrow=regrow,
        mode=mode,
    )
    for _ in range(training.epochs):
        training.epoch()
        spam.step()
    posterior = spam.posterior()
    spam.remove()
    return posterior


def _epochs(training: Training, full: float) -> int:
    """Epochs of the full scale converted to that of a training; at least one."""
    return max(1, round(training.epochs * full / training.recipe.epochs))
