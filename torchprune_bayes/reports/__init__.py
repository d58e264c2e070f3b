"""Measure pruned models, collect the results in tables, draw them.

Measure
    :func:`evaluate` runs a model over data and returns :class:`ClassificationMetrics`: accuracy,
    top-5 accuracy, negative log-likelihood, expected calibration error, Brier score.
    :func:`collect_sums` does so on one of several ranks and returns :class:`MetricSums` to merge.
    The single metrics, :func:`accuracy`, :func:`top5`, :func:`negative_log_likelihood`,
    :func:`expected_calibration_error`, :func:`brier_score` and, for language models,
    :func:`perplexity`, work on tensors.

    :func:`compression_curve`, :func:`stopping_points`, :func:`sweep_p1` and
    :func:`rank_correlations` examine a trained model with gates: how far they can be closed, by
    which ranking, where the evidence stops, and the parameters, FLOPs and latency that remain
    after shrinking. :func:`compare_speed` times any model against its shrunk version,
    :func:`evaluate_attacked` measures several models under adversarial attacks, and
    :func:`measure_energy` the energy that a block of code uses.

Collect
    :class:`ResultsTable` holds one row per run, averages over seeds and writes text, Markdown,
    LaTeX, CSV and JSON.

Draw
    :func:`plot_accuracy_against_sparsity` compares methods in one figure, and
    :func:`plot_accuracy_against_compression` rankings of units, with their stopping points;
    :func:`plot_loss_curves` shows how many units each group can lose, :func:`plot_reliability`
    how well a model is calibrated. All need matplotlib,
    ``python -m pip install ".[plots]"`` in a checkout.

Write
    :class:`HtmlReport` writes a run to one HTML file that opens offline.

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
    temperature  accuracy  top5     nll     ece   brier  samples
    -----------  --------  ----  ------  ------  ------  -------
           1.00      0.75   1.0  0.8408  0.0388  0.4187        4
           0.25      0.75   1.0  2.0010  0.2490  0.4993        4
"""

from torchprune_bayes.reports.comparison_plot import plot_comparison
from torchprune_bayes.reports.compression import (
    compression_curve,
    stopping_points,
    sweep_p1,
)
from torchprune_bayes.reports.compression_plot import plot_accuracy_against_compression
from torchprune_bayes.reports.energy import Energy, EnergyMeter, measure_energy
from torchprune_bayes.reports.evaluation import collect_sums, evaluate
from torchprune_bayes.reports.gate_histogram import plot_gate_means
from torchprune_bayes.reports.html_report import HtmlReport, LayerChange, versions
from torchprune_bayes.reports.loss_curves import plot_loss_curves
from torchprune_bayes.reports.metrics import (
    ClassificationMetrics,
    MetricSums,
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    perplexity,
    top5,
)
from torchprune_bayes.reports.plots import plot_accuracy_against_sparsity
from torchprune_bayes.reports.rank_correlation import rank_correlations
from torchprune_bayes.reports.reliability import plot_reliability
from torchprune_bayes.reports.robustness import evaluate_attacked, plot_attacked
from torchprune_bayes.reports.speed import Speed, compare_speed
from torchprune_bayes.reports.tables import ResultsTable

__all__ = [
    "ClassificationMetrics",
    "Energy",
    "EnergyMeter",
    "HtmlReport",
    "LayerChange",
    "MetricSums",
    "ResultsTable",
    "Speed",
    "accuracy",
    "brier_score",
    "collect_sums",
    "compare_speed",
    "compression_curve",
    "evaluate",
    "evaluate_attacked",
    "expected_calibration_error",
    "measure_energy",
    "negative_log_likelihood",
    "perplexity",
    "plot_accuracy_against_compression",
    "plot_accuracy_against_sparsity",
    "plot_attacked",
    "plot_comparison",
    "plot_gate_means",
    "plot_loss_curves",
    "plot_reliability",
    "rank_correlations",
    "stopping_points",
    "sweep_p1",
    "top5",
    "versions",
]
