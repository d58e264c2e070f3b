"""Measure pruned models, collect the results in tables, draw them.

Measure
    :func:`evaluate` runs a model over data and returns :class:`ClassificationMetrics`: accuracy,
    negative log-likelihood, expected calibration error, Brier score. :func:`collect_sums` does
    so on one of several ranks and returns :class:`MetricSums` to merge. The single metrics,
    :func:`accuracy`, :func:`negative_log_likelihood`, :func:`expected_calibration_error`,
    :func:`brier_score` and, for language models, :func:`perplexity`, work on tensors.

    :func:`compression_curve`, :func:`rank_correlations` and :func:`sweep_p1` look at the gates of
    a model: how far they can be closed, by which ranking, and where the evidence stops.

Collect
    :class:`ResultsTable` holds one row per run, averages over seeds and writes text, Markdown,
    LaTeX, CSV and JSON.

Draw
    :func:`plot_accuracy_against_sparsity` compares methods in one figure; needs matplotlib,
    ``pip install "torchprune_bayes[plots]"``.

Example:
    >>> from dataclasses import asdict
    >>> import torch
    >>> from torchprune_bayes.reports import ResultsTable, evaluate
    >>> logits, labels = torch.eye(4) * 2, torch.tensor([0, 1, 2, 2])
    >>> table = ResultsTable()
    >>> for temperature in (1.0, 0.25):
    ...     metrics = evaluate(torch.nn.Identity(), [(logits / temperature, labels)])
    ...     table.add(temperature=temperature, **asdict(metrics))
    >>> print(table)
    temperature  accuracy     nll     ece   brier  samples
    -----------  --------  ------  ------  ------  -------
           1.00      0.75  0.8408  0.0388  0.4187        4
           0.25      0.75  2.0010  0.2490  0.4993        4
"""

from torchprune_bayes.reports.compression import (
    compression_curve,
    rank_correlations,
    sweep_p1,
)
from torchprune_bayes.reports.evaluation import collect_sums, evaluate
from torchprune_bayes.reports.metrics import (
    ClassificationMetrics,
    MetricSums,
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    perplexity,
)
from torchprune_bayes.reports.plots import plot_accuracy_against_sparsity
from torchprune_bayes.reports.tables import ResultsTable

__all__ = [
    "ClassificationMetrics",
    "MetricSums",
    "ResultsTable",
    "accuracy",
    "brier_score",
    "collect_sums",
    "compression_curve",
    "evaluate",
    "expected_calibration_error",
    "negative_log_likelihood",
    "perplexity",
    "plot_accuracy_against_sparsity",
    "rank_correlations",
    "sweep_p1",
]
