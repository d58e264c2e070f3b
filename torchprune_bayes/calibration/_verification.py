"""What is verified about the data, the model and the gradients while they are used."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from warnings import warn

import torch
from torch import Tensor

from torchprune_bayes._checks import check_count
from torchprune_bayes.calibration._batches import Batch, map_tensors, tensors_in
from torchprune_bayes.calibration._functional import FunctionalModel, preserved
from torchprune_bayes.calibration._randomness import IsolatedRandomness
from torchprune_bayes.errors import ArgumentError, CalibrationError, CalibrationWarning


def check_num_samples(num_samples: int | None, mini_batch: int) -> None:
    """Refuse a number of samples that is not a number of complete mini-batches."""
    if num_samples is None:
        return
    check_count("num_samples", num_samples)
    if num_samples % mini_batch:
        raise ArgumentError(
            f"Expected `num_samples` to be a multiple of mini_batch={mini_batch}, "
            f"got {num_samples}."
        )


def check_finite_gradients(gradients: Mapping[str, Tensor]) -> None:
    """Refuse gradients with NaN or infinite entries and name their tensors."""
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if bad:
        raise CalibrationError(
            f"Expected finite gradients, got NaN or infinite ones in {', '.join(bad)}: "
            "check the loss, the data and the weights."
        )


class RepeatCheck:
    """Warns, once each, where the model or the data do not give the same again.

    The model is run twice on the first sample of the first pass; the first sample of every later
    pass is compared with it.

    Args:
        functional: The model.
        seed: Seed of the random numbers that the model may draw.
        enabled: Whether to warn at all.
    """

    def __init__(self, functional: FunctionalModel, seed: int, *, enabled: bool) -> None:
        self._functional = functional
        self._seed = seed
        self._first: Batch | None = None
        self._to_check = {"model", "data"} if enabled else set()

    def restarted(self) -> RepeatCheck:
        """The same for another draw of the samples; what is checked here counts there too."""
        other = copy.copy(self)
        other._first = None
        return other

    def begin_pass(self, sample: Batch) -> None:
        """Look at the first sample of a pass, a batch of one on the device."""
        if self._first is None:
            self._first = map_tensors(sample, Tensor.clone)
            self._compare("model", sample)
        elif not _same_tensors(self._first, sample):
            self._compare("data", sample)

    def _compare(self, what: str, sample: Batch) -> None:
        if what not in self._to_check:
            return
        self._to_check.remove(what)
        _, constants = self._functional.bind(None)
        randomness = IsolatedRandomness(self._seed, self._functional.device)
        with preserved(self._functional.model), randomness, torch.no_grad():
            first, again = (
                float(self._functional.loss({}, constants, batch))
                for batch in (self._first, sample)
            )
        if what == "data" or abs(again - first) > 0:
            warn(
                f"The {what} is not deterministic: the loss of the first calibration sample "
                f"changed by {abs(again - first):.1e} (from {first:.6g}) on repetition, so "
                "curvature and scores of several passes will not belong together.",
                CalibrationWarning,
                stacklevel=2,
            )


def _same_tensors(first: Batch, second: Batch) -> bool:
    ours, others = tensors_in(first), tensors_in(second)
    return len(ours) == len(others) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
        for a, b in zip(ours, others, strict=True)
    )
