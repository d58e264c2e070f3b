"""Pruning while a model is trained, in any training loop."""

from torchprune_bayes.training._optimizers import bare_optimizer
from torchprune_bayes.training.batch_norm import reestimate_batch_norm
from torchprune_bayes.training.flops import TrainingFlops
from torchprune_bayes.training.gate_decorators import (
    GateDecorator,
    close_gates,
    collect_scores,
    decorate_norms,
    fold_gates,
    gate_penalty,
)
from torchprune_bayes.training.gates import GateTraining, gate_parameter_groups
from torchprune_bayes.training.gradual import GradualPruner
from torchprune_bayes.training.hard_concrete import HardConcreteGate, expected_l0
from torchprune_bayes.training.keep_sparse import keep_sparse
from torchprune_bayes.training.l0_gates import attach_l0_gates, fold_l0_gates
from torchprune_bayes.training.penalties import count_below, group_hoyer_square, hoyer_square
from torchprune_bayes.training.prior_decay import PriorDecay
from torchprune_bayes.training.rewinding import IterativeMagnitudePruning
from torchprune_bayes.training.shrinking import GradualShrinking
from torchprune_bayes.training.spam import SpaM
from torchprune_bayes.training.tick_tock import TickTock
from torchprune_bayes.training.tracking import PruningLog

__all__ = [
    "GateDecorator",
    "GateTraining",
    "GradualPruner",
    "GradualShrinking",
    "HardConcreteGate",
    "IterativeMagnitudePruning",
    "PriorDecay",
    "PruningLog",
    "SpaM",
    "TickTock",
    "TrainingFlops",
    "attach_l0_gates",
    "bare_optimizer",
    "close_gates",
    "collect_scores",
    "count_below",
    "decorate_norms",
    "expected_l0",
    "fold_gates",
    "fold_l0_gates",
    "gate_parameter_groups",
    "gate_penalty",
    "group_hoyer_square",
    "hoyer_square",
    "keep_sparse",
    "reestimate_batch_norm",
]
