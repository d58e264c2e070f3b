"""Pruning while a model is trained, in any training loop."""

from torchprune_bayes.training.batch_norm import reestimate_batch_norm
from torchprune_bayes.training.gradual import GradualPruner
from torchprune_bayes.training.keep_sparse import keep_sparse

__all__ = ["GradualPruner", "keep_sparse", "reestimate_batch_norm"]
