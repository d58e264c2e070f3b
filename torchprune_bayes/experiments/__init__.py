"""Published experiments: their descriptions, and one engine that repeats them."""

from __future__ import annotations

from torchprune_bayes.experiments.description import Experiment
from torchprune_bayes.experiments.tables import bmrs, cbs, snipit, spam, woodfisher

EXPERIMENTS: dict[str, Experiment] = {
    **woodfisher.EXPERIMENTS,
    **cbs.EXPERIMENTS,
    **bmrs.EXPERIMENTS,
    **spam.EXPERIMENTS,
    **snipit.EXPERIMENTS,
}
"""Tables that can be repeated, by name."""

__all__ = ["EXPERIMENTS", "Experiment"]
