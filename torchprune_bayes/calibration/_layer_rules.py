"""Gradients of single samples by the rules of the layers, from one pass over all of them.

A layer with inputs ``a`` and gradients ``g`` by its outputs has the gradients ``Σ_t g_nt a_ntᵀ`` by
its weight, one for every sample ``n``: the pass over a batch has all of ``a`` and ``g``, and a
product for every layer remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchprune_bayes.calibration.batches import Batch, batch_size, cut
from torchprune_bayes.calibration.functional import FunctionalModel
from torchprune_bayes.calibration.labels import layout_of
from torchprune_bayes.calibration.normalisation import labels_in
from torchprune_bayes.layer_kinds.gradients import SampleGradients, multiply_out
from torchprune_bayes.layer_recording import Layer, layers_of, recorded


def layer_gradients(
    functional: FunctionalModel,
    leaves: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    batch: Batch,
    mini_batch: int = 1,
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients of the losses of several mini-batches, each with its own loss.

    Args:
        functional: The model.
        leaves: Values to differentiate by.
        constants: The other values of the state.
        batch: All samples.
        mini_batch: Samples of a gradient.
        into: Tensors to write to, ``{name: [rows, *shape]}``; by default new tensors.

    Returns:
        ``{name: [rows, *shape]}``.

    Raises:
        RuntimeError: If a layer has no rule, or the outputs are not those of single samples.

    Cost: one forward and backward pass, in which gradients by weights are products of ``rows``
    times the memory; patches of convolutions are cut out for a few samples at a time.
    """
    count = batch_size(batch) // mini_batch
    if into is None:
        into = {name: leaf.new_empty((count, *leaf.shape)) for name, leaf in leaves.items()}
    unreached = set(leaves)
    for name, uses in _uses(functional, leaves, constants, batch, mini_batch):
        multiply_out(uses, into[name])
        unreached.discard(name)
    for name in unreached:
        into[name].zero_()
    _mask(into, functional.leaf_names(), constants)
    return dict(into)


def layer_line_sums(
    functional: FunctionalModel,
    leaves: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    batch: Batch,
    values: Mapping[str, Tensor],
    lines: Mapping[str, Sequence[int]],
) -> dict[tuple[str, int], Tensor]:
    """``Σ w ∂ℓ_n/∂w`` over the entries at each place along dimensions of the weights.

    Args:
        functional: The model.
        leaves: Values to differentiate by.
        constants: The other values of the state.
        batch: All samples, each with its own loss.
        values: ``w``, as the layers use it.
        lines: Dimensions by the name of the weight.

    Returns:
        ``[samples, places]`` by name and dimension; what the loss does not reach is missing.

    Raises:
        RuntimeError: As for :func:`layer_gradients`.

    Cost: one forward and backward pass, and a product of the weights with their layer's inputs or
    gradients by its outputs; no gradient by a weight is formed.
    """
    result = {}
    for name, uses in _uses(functional, leaves, constants, batch, 1):
        for dim in lines.get(name, ()):
            sums = [use.line_sums(values[name], dim) for use in uses]
            result[name, dim] = torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]
    return result


def _uses(
    functional: FunctionalModel,
    leaves: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    batch: Batch,
    mini_batch: int,
) -> Iterator[tuple[str, list[SampleGradients]]]:
    """Yield each weight that the loss reaches with the gradients of its uses, as factors."""
    count = batch_size(batch) // mini_batch
    trainable = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    with (
        torch.enable_grad(),
        recorded(_layers_with(functional, set(leaves)), count, mini_batch) as recording,
    ):
        output, target = functional.output(trainable, constants, batch)
        of_part = _loss_of_part(functional, batch, output, target)
        starts = range(0, count * mini_batch, mini_batch)
        total = torch.stack([of_part(slice(at, at + mini_batch)) for at in starts]).sum()
    if recording.unbatched & set(leaves):
        raise RuntimeError("layers whose inputs are not those of single samples")
    for name, uses in recording.sample_gradients(total, None):
        if name in leaves:
            yield name, uses


def _layers_with(functional: FunctionalModel, names: set[str]) -> Sequence[Layer]:
    layers = [one for one in layers_of(functional.space) if names & set(one.names.values())]
    known = {name for layer in layers for name in layer.names.values()}
    if unknown := names - known:
        raise RuntimeError(f"no rule for {', '.join(sorted(unknown))}")
    return layers


def _loss_of_part(
    functional: FunctionalModel, batch: Batch, output: Any, target: Any
) -> Callable[[slice], Tensor]:
    """The mean loss of some of the samples, computed from the output of all.

    A model that computes its own loss gives that of all samples together. Where this is the mean
    cross-entropy of its logits and the labels, the losses of single samples are known as well.

    Raises:
        RuntimeError: If it is another loss.
    """
    if functional.loss_fn is not None:
        samples = batch_size(batch)
        return lambda part: functional.loss_of(
            _samples_of(output, part, samples), cut(target, part.start, part.stop)
        )
    logits: Any = getattr(output, "logits", None)
    labels = labels_in(batch)
    layout = layout_of(functional.loss_of(output, None), logits, labels)
    if layout is None:
        raise RuntimeError("a loss within the model that is no mean cross-entropy of its logits")
    return lambda part: layout.loss(logits[part], labels[part])


def _samples_of(output: Any, where: slice, samples: int) -> Any:
    """Some samples of a model's output, which may be a tensor or an object that holds some."""

    def chosen(tensor: Tensor) -> Tensor:
        return tensor[where] if tensor.ndim and len(tensor) == samples else tensor

    return chosen(output) if isinstance(output, Tensor) else tree_map_only(Tensor, chosen, output)


def _mask(
    rows: Mapping[str, Tensor], leaf_names: Mapping[str, str], constants: Mapping[str, Tensor]
) -> None:
    # A pruning hook multiplies its tensor by a mask, and so the gradient by the leaf.
    for name, gradients in rows.items():
        mask = constants.get(f"{leaf_names[name].removesuffix('_orig')}_mask")
        if mask is not None and leaf_names[name].endswith("_orig"):
            gradients *= mask
