"""Running a model over data to measure it, leaving the model unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from torchprune_bayes.calibration.batches import map_tensors
from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.reports.metrics import ClassificationMetrics, MetricSums

Forward: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""What turns the model and one batch into logits `[..., K]` and labels `[...]`."""


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    progress: bool = False,
) -> ClassificationMetrics:
    """Measure accuracy, likelihood and calibration error of a model on labelled data.

    The model runs in eval mode without gradients; the training flag of every submodule is
    restored afterwards, also after an exception, and so are the weights that PyTorch's pruning
    hooks recompute. Only sums are stored, so memory does not grow with the data; time is
    that of the forward passes.

    Logits of tokens `[B, T, K]` count one sample per position with a label other than ``-100``.
    They are compared with the labels at the *same* position: for a causal language model, whose
    logits predict the next token, shift them in ``forward``::

        def shifted(model, batch):
            return model(**batch).logits[:, :-1], batch["labels"][:, 1:]

    Args:
        model: Any model whose output is the logits or has them as ``.logits``.
        batches: ``(input, target)`` pairs, called as ``model(input)`` (``model(*input)`` for
            tuples and lists, ``model(**input)`` for mappings), or mappings with a ``"labels"``
            key, called as ``model(**batch)`` as Hugging Face models are.
        device: Where the tensors of each batch are moved; by default to the first parameter's
            device. The model itself is never moved.
        forward: Called as ``forward(model, batch)`` with the moved batch, for other batches and
            outputs; returns logits `[..., K]` and integer labels `[...]`.
        progress: Whether to show a progress bar.

    Returns:
        The metrics, with the expected calibration error over 15 bins; see
        :func:`collect_sums` for other numbers of bins and for several ranks.

    Raises:
        ArgumentTypeError: If a batch or an output has none of the forms above.
        ArgumentError: If all labels are ignored, shapes do not match, labels are out of range or
            logits are not finite.

    Example:
        >>> import torch
        >>> from torchprune_bayes.reports import evaluate
        >>> batches = [(torch.eye(3) * 5, torch.tensor([0, 1, 0]))]
        >>> metrics = evaluate(torch.nn.Identity(), batches)
        >>> f"{metrics.accuracy:.3f} {metrics.nll:.3f} {metrics.ece:.3f} {metrics.brier:.3f}"
        '0.667 1.680 0.320 0.654'
    """
    sums = collect_sums(model, batches, device=device, forward=forward, progress=progress)
    return sums.compute()


def collect_sums(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    bins: int = 15,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    progress: bool = False,
) -> MetricSums:
    """Run a model as :func:`evaluate` does and return sums that can be merged over ranks.

    Args:
        model: See :func:`evaluate`.
        batches: This rank's share of the data; may be empty.
        bins: Number of confidence bins of the expected calibration error.
        device: See :func:`evaluate`.
        forward: See :func:`evaluate`.
        progress: See :func:`evaluate`.

    Returns:
        The sums; ``.merge`` those of the other ranks, then ``.compute()``.

    Raises:
        ArgumentTypeError: See :func:`evaluate`.
        ArgumentError: As :func:`evaluate`, except that there may be no data.

    Example:
        >>> import torch
        >>> from torchprune_bayes.reports import collect_sums
        >>> model, logits = torch.nn.Identity(), torch.eye(2)
        >>> first = collect_sums(model, [(logits, torch.tensor([0, 1]))])
        >>> second = collect_sums(model, [(logits, torch.tensor([0, 0]))])
        >>> first.merge(second).compute().accuracy
        0.75
    """
    sums = MetricSums(bins)
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), None)
    call = _default_forward if forward is None else forward
    with preserved(model), torch.no_grad():
        for batch in tqdm(batches, desc="evaluate", disable=not progress):
            moved = map_tensors(batch, lambda tensor: tensor.to(device))
            sums.update(*call(model, moved))
    return sums


def _default_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping) and "labels" in batch:
        # Labels are passed too: encoder-decoder models make the decoder's input from them.
        return logits_of(model(**batch)), batch["labels"]
    if isinstance(batch, tuple) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(inputs, Mapping):
            return logits_of(model(**inputs)), labels
        return logits_of(model(*inputs) if isinstance(inputs, tuple) else model(inputs)), labels
    raise ArgumentTypeError(
        "Expected each batch to be an (input, target) pair or a mapping with the key 'labels', "
        f"got {type(batch).__name__}; pass `forward` for other batches."
    )


def logits_of(output: Any) -> Tensor:
    """Extract the logits from a model's output."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ArgumentTypeError(
            "Expected the model to return a tensor of logits or an object with `.logits`, "
            f"got {type(output).__name__}; pass `forward` for other outputs."
        )
    return logits
