"""Calibration from the data sets of a Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from torchprune_bayes._checks import check_count
from torchprune_bayes._extras import optional
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.types import ParameterPairs

_LABELS = ("label", "label_ids", "labels")


def calibrate_on(
    dataset: Any,
    *,
    num_samples: int | None = 512,
    collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    **options: Any,
) -> Callable[[nn.Module, ParameterPairs], Calibration]:
    """Choose calibration data before there is a model; a callback makes the calibration from them.

    Args:
        dataset: As a Trainer's ``train_dataset``, streams included; columns that the model's
            ``forward`` does not name are dropped.
        num_samples: Samples drawn at random from it, or the first of a stream, which is not
            shuffled: shuffle it beforehand.
        collator: Makes a batch of samples; default as in a Trainer without a tokenizer.
        batch_size: Samples that are collated, and padded, as one batch.
        options: Further arguments of :class:`~torchprune_bayes.Calibration`.

    Returns:
        A function ``(model, params) -> Calibration``.

    Raises:
        ArgumentError: If ``batch_size`` is below 1.
        MissingExtraError: If transformers is not installed.

    Example:
        >>> make = calibrate_on([{"x": [1.0, 2.0], "label": 0}] * 4, num_samples=4, batch_size=2)
    """
    check_count("batch_size", batch_size)
    if collator is None:
        with optional("transformers", "hf"):
            from transformers import default_data_collator
        collator = default_data_collator
    join = collator

    def make(model: nn.Module, params: ParameterPairs) -> Calibration:
        accepted = {*inspect.signature(model.forward).parameters, *_LABELS}

        def collate(samples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
            kept = [{key: s[key] for key in s if key in accepted} for s in samples]
            return join(kept)

        shuffle = not isinstance(dataset, IterableDataset)
        loader = DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, collate_fn=collate)
        return Calibration(model, loader, params=params, num_samples=num_samples, **options)

    return make
