from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.reports import _samples
from torchprune_bayes.reports.metrics import (
    ClassificationMetrics,
    MetricSums,
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    perplexity,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@st.composite
def logits_and_labels(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    # Multiples of a half make ties frequent; no probability but 1/K falls on the edge of a bin.
    samples, classes = draw(st.integers(1, 20)), draw(st.integers(2, 8))
    halves = st.integers(-24, 24).map(lambda n: n / 2)
    rows = st.lists(halves, min_size=classes, max_size=classes)
    logits = draw(st.lists(rows, min_size=samples, max_size=samples))
    label = st.integers(0, classes - 1) | st.just(-100)
    return logits, draw(st.lists(label, min_size=samples, max_size=samples))


def twin(logits: list[list[float]], labels: list[int], bins: int) -> ClassificationMetrics:
    """The definitions, one sample and one bin at a time."""
    nlls, briers, hits, top, confidences = [], [], [], [], []
    for row, label in zip(logits, labels, strict=True):
        if label == -100:
            continue
        total = math.fsum(math.exp(z - max(row)) for z in row)
        p = [math.exp(z - max(row)) / total for z in row]
        nlls.append(math.log(total) + max(row) - row[label])
        briers.append(math.fsum((p[k] - (k == label)) ** 2 for k in range(len(p))))
        ranked = sorted(range(len(row)), key=lambda k: (-row[k], k))
        hits.append(ranked[0] == label)
        top.append(label in ranked[:5])
        confidences.append(max(p))
    n, ece = len(nlls), 0.0
    for b in range(bins):
        members = [i for i in range(n) if b / bins < confidences[i] <= (b + 1) / bins]
        if members:
            bin_accuracy = sum(hits[i] for i in members) / len(members)
            bin_confidence = sum(confidences[i] for i in members) / len(members)
            ece += len(members) / n * abs(bin_accuracy - bin_confidence)
    return ClassificationMetrics(
        sum(hits) / n, sum(top) / n, sum(nlls) / n, ece, sum(briers) / n, n
    )


def assert_equal(found: ClassificationMetrics, expected: ClassificationMetrics) -> None:
    assert vars(found) == pytest.approx(vars(expected), rel=1e-12, abs=1e-12)


def random_batch(*shape: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    return logits, torch.arange(math.prod(shape)).reshape(shape) % classes


def test_equal_logits():
    logits, labels = torch.zeros(4, 4), torch.tensor([0, 1, 2, 3])
    assert accuracy(logits, labels) == 0.25  # the first class wins ties
    assert negative_log_likelihood(logits, labels) == pytest.approx(math.log(4))
    assert brier_score(logits, labels) == 0.75
    assert expected_calibration_error(logits, labels) == 0.0


def test_certain_and_wrong():
    logits, labels = torch.tensor([[1000.0, 0.0]]), torch.tensor([1])
    found = MetricSums().update(logits, labels).compute()
    assert found == ClassificationMetrics(
        accuracy=0.0, top5=1.0, nll=1000.0, ece=1.0, brier=2.0, samples=1
    )


def test_certain_and_right_has_no_rounding_below_zero():
    logits, labels = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([0])
    assert 0 <= brier_score(logits, labels) < 1e-30
    assert 0 <= negative_log_likelihood(logits, labels) < 1e-15


def test_largest_logit_where_probabilities_round_to_a_tie():
    assert accuracy(torch.tensor([[0.0, 1e-30]]), torch.tensor([1])) == 1.0


@pytest.mark.parametrize(("bins", "expected"), [(1, 0.25), (2, 0.75)])
def test_bins_are_closed_above(bins, expected):
    # Confidence 1/2 and right, confidence 1 and wrong: in one bin |1/2 - 3/4|, in a lower and an
    # upper bin (|1 - 1/2| + |0 - 1|) / 2.
    logits, labels = torch.tensor([[0.0, 0.0], [0.0, 99.0]]), torch.tensor([0, 0])
    assert expected_calibration_error(logits, labels, bins) == expected


@settings(deadline=None)
@given(logits_and_labels(), st.integers(1, 20))
def test_slow_twin(data, bins):
    logits, labels = data
    if set(labels) == {-100}:
        labels[0] = 0
    sums = MetricSums(bins).update(torch.tensor(logits), torch.tensor(labels))
    assert_equal(sums.compute(), twin(logits, labels, bins))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=24, max_size=24), st.integers(1, 20))
def test_merge_equals_union(owner, bins):
    logits, labels = random_batch(24)
    ranks = torch.tensor(owner)
    merged = MetricSums(bins)
    for rank in range(3):
        merged.merge(MetricSums(bins).update(logits[ranks == rank], labels[ranks == rank]))
    assert_equal(merged.compute(), MetricSums(bins).update(logits, labels).compute())


@pytest.mark.parametrize("entries", [1, 12, 60])
def test_chunks_do_not_show(monkeypatch, entries):
    logits, labels = random_batch(24)
    whole = MetricSums().update(logits, labels).compute()
    monkeypatch.setattr(_samples, "_CHUNK_ENTRIES", entries)
    assert_equal(MetricSums().update(logits, labels).compute(), whole)


def test_token_logits_are_flattened():
    logits, labels = random_batch(3, 8)
    flat = MetricSums().update(logits.flatten(0, 1), labels.flatten()).compute()
    assert MetricSums().update(logits, labels).compute() == flat
    assert flat.samples == 24


def test_ignored_positions_do_not_count_whatever_their_logits():
    logits, labels = random_batch(6)
    kept = MetricSums().update(logits, labels).compute()
    padded = torch.cat([logits, torch.full((2, 5), math.nan)])
    ignored = torch.tensor([-100, -100])
    assert MetricSums().update(padded, torch.cat([labels, ignored])).compute() == kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_float64_on_any_device(device, dtype):
    logits, labels = random_batch(24)
    logits = logits.to(dtype)
    exact = twin(logits.tolist(), labels.tolist(), 15)
    assert_equal(MetricSums().update(logits.to(device), labels).compute(), exact)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_integer_labels_of_any_width(dtype):
    logits, labels = random_batch(6)
    assert accuracy(logits, labels.to(dtype)) == accuracy(logits, labels)


def test_logits_that_require_gradients():
    logits, labels = random_batch(6)
    assert accuracy(logits.requires_grad_(), labels) == accuracy(logits.detach(), labels)
    assert logits.grad is None


def test_sums_pickle():
    sums = MetricSums(7).update(*random_batch(6))
    assert pickle.loads(pickle.dumps(sums)).compute() == sums.compute()


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50257)) == pytest.approx(50257)
    assert perplexity(1e4) == math.inf


@pytest.mark.parametrize("nll", [-0.1, math.nan])
def test_perplexity_refuses(nll):
    with pytest.raises(ArgumentError, match="mean_nll"):
        perplexity(nll)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long)),
        (torch.zeros(3), torch.tensor(0)),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)),
    ],
    ids=["samples", "classes-first", "one-dimension", "one-class"],
)
def test_shapes_that_do_not_match(logits, labels):
    with pytest.raises(ArgumentError, match=r"`logits` \[..., K\]"):
        MetricSums().update(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "name"),
    [
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long), "logits"),
        ([[0.0, 1.0]], torch.zeros(1, dtype=torch.long), "logits"),
        (torch.zeros(2, 2), torch.zeros(2), "labels"),
        (torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool), "labels"),
        (torch.zeros(1, 2), [0], "labels"),
    ],
)
def test_types_that_do_not_fit(logits, labels, name):
    with pytest.raises(ArgumentTypeError, match=f"`{name}`"):
        MetricSums().update(logits, labels)


@pytest.mark.parametrize(
    ("logit", "label", "message"),
    [
        (math.nan, 0, "`logits` to be finite"),
        (-math.inf, 0, "`logits` to be finite"),
        (0.0, 5, r"`labels` in \[0, 5\) or -100, got 5"),
        (0.0, -1, r"`labels` in \[0, 5\) or -100, got -1"),
    ],
)
def test_refused_batch_leaves_the_sums(monkeypatch, logit, label, message):
    monkeypatch.setattr(_samples, "_CHUNK_ENTRIES", 5)  # the fault lies in a later chunk
    sums = MetricSums().update(*random_batch(6))
    before = sums.compute()
    logits, labels = random_batch(6)
    logits[3, 2], labels[3] = logit, label
    with pytest.raises(ArgumentError, match=message):
        sums.update(logits, labels)
    assert sums.compute() == before


def test_no_data():
    ignored = torch.tensor([-100])
    with pytest.raises(ArgumentError, match="at least one sample"):
        accuracy(torch.zeros(1, 2), ignored)


def test_bins_are_checked():
    with pytest.raises(ArgumentError, match="`bins`"):
        MetricSums(0)
    with pytest.raises(ArgumentError, match="sums with 15 bins, got 10 bins"):
        MetricSums(15).merge(MetricSums(10))


def test_torchmetrics_agrees():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = random_batch(300, classes=9)
    found = MetricSums().update(logits, labels).compute()
    options = {"num_classes": 9, "validate_args": False}
    for k, value in ((1, found.accuracy), (5, found.top5)):
        share = functional.multiclass_accuracy(logits, labels, top_k=k, average="micro", **options)
        assert float(share) == pytest.approx(value)
    gap = functional.multiclass_calibration_error(logits.softmax(1), labels, n_bins=15, **options)
    assert float(gap) == pytest.approx(found.ece, abs=1e-6)


@given(st.integers(1, 40), st.integers(2, 7))
def test_the_gaps_of_the_reliability_diagram_add_up_to_the_calibration_error(samples, classes):
    logits, labels = random_batch(samples, classes=classes)
    sums = MetricSums().update(logits, labels)
    rows = list(sums.reliability())
    assert sum(row["samples"] for row in rows) == samples
    gap = sum(row["samples"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / samples
    assert gap == pytest.approx(sums.compute().ece, abs=1e-12)
