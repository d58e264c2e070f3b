"""Pruning inside ``transformers.Trainer``.

Callbacks
    :class:`PruningCallback` prunes with any method and schedule. :class:`ShrinkingCallback` removes
    channels and heads. :class:`SpaMCallback` trains with the marginal likelihood and
    :class:`GateCallback` with noise gates, for pruning afterwards.

Further tools
    :func:`calibrate_on` chooses calibration data. :class:`TrainerMetrics` is a
    ``compute_metrics`` with likelihood and calibration error. :class:`DistillationTrainer` trains
    towards the dense model. :func:`merge_adapters` merges LoRA adapters without losing zeros.
    :func:`last_whole_checkpoint` finds the checkpoint to resume a killed run from.

Example:
    >>> from torchprune_bayes import cubic
    >>> pruning = PruningCallback("magnitude", cubic(0.9, begin=100, end=900, every=50))
    >>> # Trainer(..., callbacks=[pruning], compute_metrics=pruning.metrics())
"""

from torchprune_bayes.integrations._hf_calibration import calibrate_on
from torchprune_bayes.integrations._hf_distillation import DistillationTrainer
from torchprune_bayes.integrations._hf_lora import merge_adapters
from torchprune_bayes.integrations._hf_metrics import TrainerMetrics
from torchprune_bayes.integrations._hf_pruning import PruningCallback
from torchprune_bayes.integrations._hf_resume import last_whole_checkpoint
from torchprune_bayes.integrations._hf_shrinking import ShrinkingCallback
from torchprune_bayes.integrations._hf_training import GateCallback, SpaMCallback

__all__ = [
    "DistillationTrainer",
    "GateCallback",
    "PruningCallback",
    "ShrinkingCallback",
    "SpaMCallback",
    "TrainerMetrics",
    "calibrate_on",
    "last_whole_checkpoint",
    "merge_adapters",
]
