"""Checks of the data, the model and the gradients while they are used."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from warnings import warn

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_count
from torchprune_bayes.calibration.batches import Batch, map_tensors, same_tensors
from torchprune_bayes.calibration.functional import FunctionalModel, preserved
from torchprune_bayes.calibration.randomness import IsolatedRandomness
from torchprune_bayes.errors import ArgumentError, CalibrationError, CalibrationWarning

_MOSTLY_ZERO = 2  # warned of from one in so many informative gradients on


def check_num_samples(num_samples: int | str | None, mini_batch: int) -> int | None:
    """The number of samples, if given; refuse one that is not a multiple of a mini-batch.

    Raises:
        ArgumentError: If it is not a multiple of ``mini_batch``, or not positive.
        ArgumentTypeError: If it is no number, ``None`` or ``"all"``.
    """
    if num_samples is None or num_samples == "all":
        return None
    check_count("num_samples", num_samples)
    number = int(num_samples)
    if number % mini_batch:
        raise ArgumentError(
            f"Expected `num_samples` to be a multiple of mini_batch={mini_batch}, got {number}."
        )
    return number


def check_on_one_device(model: nn.Module) -> None:
    """Refuse a model whose forward pass moves activations, as it would on copies of the weights.

    Raises:
        CalibrationError: If its parameters are on several devices.
    """
    devices = list(dict.fromkeys(str(parameter.device) for parameter in model.parameters()))
    if len(devices) > 1:
        raise CalibrationError(
            f"Expected a model on one device, got {' and '.join(devices)}: move it to one; "
            "`device=` says where to compute."
        )


def check_finite_gradients(gradients: Mapping[str, Tensor]) -> None:
    """Refuse gradients with NaN or infinite entries and name their tensors."""
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if bad:
        raise CalibrationError(
            f"Expected finite gradients, got NaN or infinite ones in {', '.join(bad)}: "
            "check the loss, the data and the weights."
        )


class InformationCheck:
    """Counts the gradients of one pass that are exactly zero.

    Args:
        mini_batch: Samples of a gradient.
        ignore_index: The label without a term in the loss.
    """

    def __init__(self, mini_batch: int, ignore_index: int) -> None:
        self._mini_batch = mini_batch
        self._ignore_index = ignore_index
        self._rows = 0
        self._informative: Tensor | int = 0

    def add(self, rows: Tensor) -> None:
        """Count gradients ``[rows, entries]``; nothing is read back from the device."""
        self._rows += len(rows)
        # Faster than `any`, and NaN counts as nonzero: it is refused elsewhere.
        zero = (rows.amax(dim=1) == 0) & (rows.amin(dim=1) == 0)
        self._informative = self._informative + (~zero).sum()

    def finish(self, *, warned: bool) -> bool:
        """Refuse gradients that are all zero, and warn if most are.

        Args:
            warned: Whether a warning was given before.

        Returns:
            Whether a warning was given by now.

        Raises:
            CalibrationError: If all are zero.
        """
        informative = int(self._informative)
        if self._rows and not informative:
            refuse_zero_gradients(f"all {self._rows}", self._ignore_index)
        if warned or informative * _MOSTLY_ZERO > self._rows:
            return warned
        warn(
            f"{self._rows - informative} of {self._rows} gradients are exactly zero, so that as "
            "many samples say nothing: no label of theirs counts, or the loss compares samples "
            f"with one another and needs `mini_batch` above {self._mini_batch}.",
            CalibrationWarning,
            stacklevel=3,
        )
        return True


def refuse_zero_gradients(which: str, ignore_index: int) -> None:
    """Refuse uninformative gradients.

    Raises:
        CalibrationError: Always.
    """
    raise CalibrationError(
        f"Expected gradients that tell weights apart, got zeros alone in {which}: the loss does "
        f"not depend on the weights, no label counts (all are equal to ignore_index={ignore_index})"
        ", or it compares the samples of a batch with one another, which takes a larger "
        "`mini_batch`."
    )


class RepeatCheck:
    """Warns, once each, if the model or the data are not deterministic.

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
        """Check the first sample of a pass, a batch of one on the device."""
        if self._first is None:
            self._first = map_tensors(sample, Tensor.clone)
            self._compare("model", sample)
        elif not same_tensors(self._first, sample):
            self._compare("data", sample)

    def _compare(self, what: str, sample: Batch) -> None:
        if what not in self._to_check:
            return
        self._to_check.remove(what)
        _, constants = self._functional.bind(None)
        randomness = IsolatedRandomness(self._seed, self._functional.device)
        with preserved(self._functional.model), randomness, torch.no_grad():
            both = [self._functional.loss({}, constants, one) for one in (self._first, sample)]
            first, again = torch.stack(both).tolist()
        if what == "data" or abs(again - first) > 0:
            warn(
                f"The {what} is not deterministic: the loss of the first calibration sample "
                f"changed by {abs(again - first):.1e} (from {first:.6g}) on repetition, so "
                "curvature and scores of several passes will not belong together.",
                CalibrationWarning,
                stacklevel=2,
            )
