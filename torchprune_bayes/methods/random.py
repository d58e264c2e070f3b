"""Random pruning: PyTorch's own method, registered unchanged."""

from __future__ import annotations

from torch.nn.utils.prune import RandomUnstructured

from torchprune_bayes.methods.registry import register

register("random", title="uniformly at random", paper="", needs_calibration=False)(
    RandomUnstructured
)
Random = RandomUnstructured
