"""Accuracy, likelihood and calibration error as a Trainer's ``compute_metrics``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes.reports import MetricSums


class TrainerMetrics:
    """Accuracy, negative log-likelihood, expected calibration error and Brier score.

    Pass it to ``Trainer(compute_metrics=...)``; the Trainer logs each with its prefix, as
    ``eval_nll``. With ``TrainingArguments(batch_eval_metrics=True)`` it adds up sums batch by batch
    and no logits are stored. Labels of -100 are ignored.

    Args:
        causal: Whether logits ``[B, T, K]`` predict the next label.
        extra: Function that returns further metrics to report.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> metrics = TrainerMetrics()((logits, labels))
        >>> round(metrics["accuracy"], 3), round(metrics["nll"], 3)
        (0.5, 0.72)
    """

    def __init__(
        self, *, causal: bool = False, extra: Callable[[], dict[str, float]] | None = None
    ) -> None:
        self._causal = causal
        self._extra = extra
        self._sums = MetricSums()

    def __call__(self, predictions: Any, compute_result: bool = True) -> dict[str, float]:
        """Add predictions and, with ``compute_result``, return the metrics and start again.

        Args:
            predictions: ``(logits, labels)``, tensors or arrays: ``transformers.EvalPrediction``.
            compute_result: Whether this was the last batch.
        """
        logits, labels = (_as_tensor(part) for part in tuple(predictions)[:2])
        if self._causal:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        self._sums.update(logits, labels)
        if not compute_result:
            return {}
        metrics = {
            key: value for key, value in asdict(self._sums.compute()).items() if key != "samples"
        }
        self._sums = MetricSums()
        return metrics | (self._extra() if self._extra is not None else {})


def _as_tensor(part: Any) -> Tensor:
    # Models that return more than logits make a tuple of it, logits first.
    first = part[0] if isinstance(part, (tuple, list)) else part
    return torch.as_tensor(first)
