"""Accuracy and calibration of class probabilities, from logits and labels.

Every function takes logits `[N, K]` or `[..., K]` of any floating type on any device, and
integer labels of the leading shape. Positions labelled ``-100`` are ignored. All sums are
computed in float64. A perfect model has accuracy 1 and the rest 0.

Not computed by torchmetrics, whose calibration error stores the confidence of every sample until
the end (here: a table of the bins) and which has no Brier score of several classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune_bayes._checks import check_count
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.reports._samples import IGNORED_LABEL, STATISTICS, chunks, statistics_of
from torchprune_bayes.reports.tables import ResultsTable


@dataclass(frozen=True)
class ClassificationMetrics:
    """What :func:`~torchprune_bayes.reports.evaluate` measured; ``dataclasses.asdict`` for a row.

    Attributes:
        accuracy: Fraction of samples whose largest logit is that of the label.
        top5: Fraction whose label is among the five largest logits; 1 with up to five classes.
        nll: Mean negative log-likelihood, in nats.
        ece: Expected calibration error, in [0, 1].
        brier: Brier score summed over classes, in [0, 2].
        samples: Number of labels that counted.
    """

    accuracy: float
    top5: float
    nll: float
    ece: float
    brier: float
    samples: int


class MetricSums:
    """Sums that determine all classification metrics, over batches, shards and ranks.

    A float64 table `[bins, 6]` on the CPU: per confidence bin the number of samples, of correct
    ones and of those right among the first five, and the summed confidence, negative
    log-likelihood and Brier score. Sums of disjoint
    data add up, so :meth:`merge` over ranks gives the result of a single process. Objects
    pickle: ``torch.distributed.all_gather_object`` transfers them. A sampler that repeats samples
    to make ranks equally long makes those samples count twice.

    Args:
        bins: Number of equal-width confidence bins of the expected calibration error.

    Raises:
        ArgumentError: If ``bins`` is not positive.

    Example:
        >>> import torch
        >>> from torchprune_bayes.reports import MetricSums
        >>> logits, labels = torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 0])
        >>> first = MetricSums().update(logits[:1], labels[:1])
        >>> second = MetricSums().update(logits[1:], labels[1:])
        >>> first.merge(second).compute().accuracy
        0.5
    """

    def __init__(self, bins: int = 15) -> None:
        check_count("bins", bins)
        self.bins = bins
        self._sums = torch.zeros(bins, STATISTICS, dtype=torch.float64)

    def update(self, logits: Tensor, labels: Tensor) -> MetricSums:
        """Add a batch; a refused batch leaves the sums unchanged.

        Takes O(N K) time and memory for a few million float64 logits beside the batch.

        Args:
            logits: Unnormalised log-probabilities `[..., K]`, floating.
            labels: Classes `[...]` in 0 ... K - 1, integer; ``-100`` is ignored.

        Returns:
            This object, so that calls chain.

        Raises:
            ArgumentTypeError: If the logits are not floating or the labels not integer tensors.
            ArgumentError: If the shapes do not match, or a label is out of range or a logit
                NaN or infinite where the label counts.
        """
        added = torch.zeros_like(self._sums)
        edges = torch.arange(1, self.bins, dtype=torch.float64) / self.bins
        for part, targets in chunks(logits, labels):
            statistics = statistics_of(part, targets).cpu()
            confidence = statistics[:, 3].contiguous()
            added.index_add_(0, torch.bucketize(confidence, edges), statistics)
        self._sums += added
        return self

    def merge(self, other: MetricSums) -> MetricSums:
        """Add the sums of other data, such as another rank's.

        Args:
            other: Sums with the same number of bins; they are not changed.

        Returns:
            This object, so that calls chain and ``functools.reduce(MetricSums.merge, ...)`` works.

        Raises:
            ArgumentError: If the numbers of bins differ.
        """
        if other.bins != self.bins:
            raise ArgumentError(f"Expected sums with {self.bins} bins, got {other.bins} bins.")
        self._sums += other._sums
        return self

    def compute(self) -> ClassificationMetrics:
        """Compute the metrics; more batches may be added afterwards.

        Returns:
            The metrics of all samples added so far.

        Raises:
            ArgumentError: If no sample has been added.
        """
        samples, correct, top5, _, nll, brier = self._sums.sum(dim=0).tolist()
        if not samples:
            raise ArgumentError(
                f"Expected at least one sample with a label other than {IGNORED_LABEL}, got "
                "none: check the data that is measured on."
            )
        # Σ_b n_b/N |correct_b/n_b - confidence_b/n_b|: the n_b cancel, empty bins included.
        gap = float((self._sums[:, 1] - self._sums[:, 3]).abs().sum())
        return ClassificationMetrics(
            accuracy=correct / samples,
            top5=top5 / samples,
            nll=nll / samples,
            ece=gap / samples,
            brier=brier / samples,
            samples=int(samples),
        )

    def reliability(self) -> ResultsTable:
        """Confidence and accuracy of each bin, as in a reliability diagram.

        Returns:
            A row for each bin that holds samples: ``confidence`` (mean), ``accuracy`` and
            ``samples``.

        Example:
            >>> import torch
            >>> from torchprune_bayes.reports import MetricSums
            >>> sums = MetricSums().update(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))
            >>> print(sums.reliability())
            confidence  accuracy  samples
            ----------  --------  -------
                   0.5      0.75        4
        """
        table = ResultsTable()
        for samples, correct, _, confidence, *_ in self._sums.tolist():
            if samples:
                table.add(
                    confidence=confidence / samples,
                    accuracy=correct / samples,
                    samples=int(samples),
                )
        return table


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose largest logit is that of the label; the first one wins ties.

    Args:
        logits: Unnormalised log-probabilities `[..., K]`, floating.
        labels: Classes `[...]`, integer; ``-100`` is ignored.

    Returns:
        The accuracy, in [0, 1].

    Raises:
        ArgumentTypeError: As :meth:`MetricSums.update`.
        ArgumentError: As :meth:`MetricSums.update`, or if no label counts.

    Example:
        >>> accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        0.5
    """
    return MetricSums().update(logits, labels).compute().accuracy


def top5(logits: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose label is among the five largest logits; the first one wins ties.

    Args:
        logits: Unnormalised log-probabilities `[..., K]`, floating.
        labels: Classes `[...]`, integer; ``-100`` is ignored.

    Returns:
        The top-5 accuracy, in [0, 1]; 1 with up to five classes.

    Raises:
        ArgumentTypeError: As :meth:`MetricSums.update`.
        ArgumentError: As :meth:`MetricSums.update`, or if no label counts.

    Example:
        >>> top5(torch.arange(8.0).expand(2, 8), torch.tensor([3, 2]))
        0.5
    """
    return MetricSums().update(logits, labels).compute().top5


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log softmax(logits)[label], in nats.

    Args:
        logits: Unnormalised log-probabilities `[..., K]`, floating.
        labels: Classes `[...]`, integer; ``-100`` is ignored.

    Returns:
        The negative log-likelihood per sample; log K for equal logits.

    Raises:
        ArgumentTypeError: As :meth:`MetricSums.update`.
        ArgumentError: As :meth:`MetricSums.update`, or if no label counts.

    Example:
        >>> round(negative_log_likelihood(torch.zeros(1, 10), torch.tensor([3])), 4)
        2.3026
    """
    return MetricSums().update(logits, labels).compute().nll


def brier_score(logits: Tensor, labels: Tensor) -> float:
    """Squared distance of the probabilities from the one-hot label (Brier, 1950).

    The mean over samples of the *sum* over classes Σ_k (p_k - [k = label])². Some papers divide
    by K as well, and for two classes some score one class only, which halves the number.

    Args:
        logits: Unnormalised log-probabilities `[..., K]`, floating.
        labels: Classes `[...]`, integer; ``-100`` is ignored.

    Returns:
        The Brier score, in [0, 2]; 1 - 1/K for equal logits.

    Raises:
        ArgumentTypeError: As :meth:`MetricSums.update`.
        ArgumentError: As :meth:`MetricSums.update`, or if no label counts.

    Example:
        >>> brier_score(torch.zeros(1, 4), torch.tensor([3]))
        0.75
    """
    return MetricSums().update(logits, labels).compute().brier


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Gap between confidence and accuracy (Guo et al., 2017, arXiv:1706.04599, eq. 5).

    The confidence of a sample is its largest probability. Bin b of B holds the confidences in
    (b/B, (b+1)/B], and the error is Σ_b n_b/N |accuracy_b - mean confidence_b|.

    Args:
        logits: Unnormalised log-probabilities `[..., K]`, floating.
        labels: Classes `[...]`, integer; ``-100`` is ignored.
        bins: Number of equal-width bins B.

    Returns:
        The expected calibration error, in [0, 1].

    Raises:
        ArgumentTypeError: As :meth:`MetricSums.update`.
        ArgumentError: As :meth:`MetricSums.update`, if no label counts or ``bins`` is not positive.

    Example:
        >>> expected_calibration_error(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))
        0.25
    """
    return MetricSums(bins).update(logits, labels).compute().ece


def perplexity(mean_nll: float) -> float:
    """Perplexity exp(NLL) of a language model.

    Args:
        mean_nll: Mean negative log-likelihood per token, in nats, such as
            ``evaluate(...).nll``.

    Returns:
        The perplexity, at least 1; infinity where it exceeds the floats (NLL above 709).

    Raises:
        ArgumentError: If ``mean_nll`` is negative or NaN.

    Example:
        >>> round(perplexity(negative_log_likelihood(torch.zeros(1, 50), torch.tensor([7]))), 6)
        50.0
    """
    if not mean_nll >= 0:
        raise ArgumentError(f"Expected a non-negative `mean_nll`, got {mean_nll!r}.")
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
