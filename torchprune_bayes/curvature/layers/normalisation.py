"""Check that the loss of a batch is the assumed mean of per-sample losses."""

from __future__ import annotations

from dataclasses import replace

import torch

from torchprune_bayes.calibration import Batch, batch_size, cut
from torchprune_bayes.calibration.normalisation import (
    common_normaliser,
    differences_in,
    differing_samples,
)
from torchprune_bayes.curvature.layers.passes import Passes
from torchprune_bayes.errors import CalibrationError

MOST_EXAMPLES = 8


class NormalisationCheck:
    """Compares the losses of single samples with that of a batch, on samples that differ.

    Equal samples would prove nothing: class weights cancel among samples of one class, and
    a mean over tokens is one over sequences where all have equally many. So a later batch is
    compared as well if its samples are the first to differ in some way, and until eight are
    compared, because two alone may agree by chance.

    Args:
        passes: The model; its ``losses`` are updated with the result.

    Attributes:
        found_late: Whether the last batch revealed what earlier ones could not, so
            that their sums have to be recomputed.
        couples: Whether the losses of mini-batches do not add up to that of a batch. Their
            gradients are then computed one by one.

    Cost: at most three times a forward pass of thrice 8 samples, or mini-batches.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._seen: frozenset[str] | None = None
        self._compared = 0
        self.couples = self.found_late = False

    def examine(self, batch: Batch) -> None:
        """Compare samples of a batch, unless it has none that differ in a new way.

        Raises:
            CalibrationError: If the loss is a mean neither over labels nor over samples; or of
                other kinds in other batches.
        """
        losses = self._passes.losses
        differences = differences_in(batch, losses.ignore_index)
        first = self._seen is None
        enough = self._compared >= MOST_EXAMPLES
        if not first and enough and differences <= (self._seen or frozenset()):
            return
        before = self._seen or frozenset()
        self._seen = before | differences
        group = losses.group
        if batch_size(batch) < 2 * group:
            return
        if group == 1:
            examples = differing_samples(batch, losses.ignore_index, MOST_EXAMPLES)
        else:
            examples = cut(batch, 0, group * min(MOST_EXAMPLES, batch_size(batch) // group))
        self._compared += batch_size(examples) // group
        self._compare(examples, undecided="number of labels" not in before, first=first)

    def _compare(self, examples: Batch, *, undecided: bool, first: bool) -> None:
        passes, group = self._passes, self._passes.losses.group
        parts = [
            cut(examples, start, start + group) for start in range(0, batch_size(examples), group)
        ]
        half = len(parts) // 2
        groups = [range(len(parts))]
        if half > 1:  # all together may agree by chance; both halves hardly do as well
            groups += [range(half), range(half, len(parts))]
        wholes = [cut(examples, g.start * group, g.stop * group) for g in groups]
        measured = torch.stack([passes.loss_and_terms(part) for part in (*wholes, *parts)])
        losses, terms = measured.mT.tolist()
        count = len(groups)
        compared = [
            (losses[at], losses[count:][g.start : g.stop], terms[count:][g.start : g.stop])
            for at, g in enumerate(groups)
        ]
        loss, singles, _ = compared[0]
        normaliser = common_normaliser(compared, passes.losses.normaliser)
        self.found_late = False
        if normaliser is None and group > 1:
            self.found_late, self.couples = not (first or self.couples), True
        elif normaliser is None:
            raise CalibrationError(
                "Expected a loss that is a mean over samples, or over labels other than "
                f"ignore_index={passes.losses.ignore_index}, got {loss:.6g} for {len(singles)} "
                f"samples whose own losses are {', '.join(f'{one:.4g}' for one in singles)}. Name "
                "the label without a term by `ignore_index`; with class weights divide by the "
                "number of samples, `cross_entropy(..., weight=weight, reduction='none').mean()`; "
                "a loss that compares samples with each other has no curvature of single ones."
            )
        elif passes.losses.normaliser != normaliser:
            if not undecided:
                raise CalibrationError(
                    "Expected one rule by which the loss counts labels, got a mean over labels in "
                    "some batches and over samples in others."
                )
            passes.losses = replace(passes.losses, normaliser=normaliser)
            self.found_late = not first
