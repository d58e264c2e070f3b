"""Passes of a model over batches, at given weights, from which gradients of samples are taken."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import grad, vmap

from torchprune_bayes.calibration import (
    Batch,
    Calibration,
    batch_size,
    cut,
    layout_of,
    map_tensors,
    preserved,
)
from torchprune_bayes.calibration.normalisation import labels_in
from torchprune_bayes.curvature.layers.losses import Evaluated, SampleLosses
from torchprune_bayes.curvature.leaves import leaves_of
from torchprune_bayes.layer_kinds.gradients import add_squares, new_total
from torchprune_bayes.layer_recording import Layer, Recording, recorded

_ROW_BYTES = 2**26


@dataclass(frozen=True)
class Routes:
    """How the gradients of single samples are computed, parameter by parameter.

    Attributes:
        layers: Layers with a rule, with the parameters that the rules are right about.
        whole: Layers whose rule is right about a batch, but not about its samples, such as those
            of models that put the sequence first. Their Kronecker factors are known.
        expanded: Parameters that are given to the model in one copy per sample, with the number of
            dimensions that these have more.
        singles: Parameters whose gradients are taken sample by sample.
        vectorized: Whether vmap does so.
    """

    layers: Sequence[Layer] = ()
    whole: Sequence[Layer] = ()
    expanded: Mapping[str, int] = field(default_factory=dict)
    singles: Sequence[str] = ()
    vectorized: bool = False


class Passes:
    """A calibration's model at given weights; nothing of it is changed.

    Args:
        calibration: Model and loss.
        weights: Values by qualified name; default the model's own.
        examples: Samples from which it is found out what the loss does with the labels.
        average: Whether the loss of a sample is the mean of its terms, and not their sum.
        ignore_index: Label without a term in the loss.
        group: Samples of a mini-batch, whose mean loss is what is differentiated; with more than
            one, "sample" means mini-batch below.
    """

    def __init__(
        self,
        calibration: Calibration,
        weights: Mapping[str, Tensor] | None,
        examples: Batch,
        *,
        average: bool,
        ignore_index: int,
        group: int = 1,
    ) -> None:
        self.calibration = calibration
        self.group = group
        self._functional = calibration.functional
        self._randomness = calibration.randomness()
        self.leaves = leaves_of(calibration, weights)
        _, self._constants = self._functional.bind(None)
        with self._isolated(), torch.no_grad():
            output, target = self._functional.output(self.leaves, self._constants, examples)
            loss = self._functional.loss_of(output, target)
        logits, labels = getattr(output, "logits", output), labels_in(examples)
        self.losses = SampleLosses(
            self._functional.loss_fn,
            layout_of(loss, logits, labels, ignore_index),
            average or group > 1,
            ignore_index,
            group,
        )

    def forward(self, batch: Batch, routes: Routes) -> tuple[Evaluated, Recording]:
        """Evaluate a batch, with a graph, and record the layers of ``routes``."""
        layers = [*routes.layers, *routes.whole]
        samples = batch_size(batch) // self.group
        with self._isolated(), recorded(layers, samples, self.group) as recording:
            leaves = dict(self.leaves)
            for name, inserted in routes.expanded.items():
                leaves[name] = recording.expand(name, leaves[name], inserted)
            return self._evaluated(leaves, batch), recording

    def loss_and_terms(self, batch: Batch) -> Tensor:
        """Loss of a batch, and how many terms it is the mean of, ``[2]``."""
        with self._isolated(), torch.no_grad():
            evaluated = self._evaluated(self.leaves, batch)
        return torch.stack([evaluated.loss.detach(), evaluated.terms.sum()])

    def squares(self, batch: Batch, routes: Routes) -> dict[str, Tensor]:
        """``Σ_n g_n²`` of the samples' own losses, by the layers and copies of ``routes``."""
        evaluated, recording = self.forward(batch, routes)
        weights = self.losses.weights(evaluated.terms)
        totals: dict[str, Tensor] = {}
        for name, uses in recording.sample_gradients(evaluated.loss, weights):
            if name not in recording.unbatched:
                totals[name] = new_total(self.leaves[name])
                add_squares(uses, totals[name])
        return totals

    def gradients_of_batch(
        self, batch: Batch, layers: Sequence[Layer]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients of a batch's mean loss by the layers' weights: by their rules, and exactly."""
        evaluated, recording = self.forward(batch, Routes(whole=layers))
        names = list(dict.fromkeys(name for layer in layers for name in layer.names.values()))
        leaves = [self.leaves[name] for name in names]
        exact = torch.autograd.grad(
            evaluated.loss, leaves, retain_graph=True, materialize_grads=True
        )
        by_rules: dict[str, Tensor] = {}
        for name, uses in recording.sample_gradients(evaluated.loss, None):
            like = self.leaves[name].detach()
            parts = [use.multiplied_out(0, slice(None), like) for use in uses]
            by_rules[name] = torch.stack(parts).sum(0).reshape(like.shape)
        return by_rules, dict(zip(names, exact, strict=True))

    def one_by_one(
        self, batch: Batch, names: Sequence[str], cotangent: Tensor | None, *, vectorized: bool
    ) -> Iterator[dict[str, Tensor]]:
        """Yield gradients ``[b, *shape]`` of a few samples at a time.

        Args:
            batch: The samples.
            names: Parameters to differentiate by.
            cotangent: What the outputs' gradients are set to; ``None`` for those of the loss.
            vectorized: Whether a few samples are taken at once by vmap.
        """
        leaves = {name: self.leaves[name].detach() for name in names}
        size = sum(leaf.nbytes for leaf in leaves.values())
        step = max(1, _ROW_BYTES // size) if vectorized else 1
        for start in range(0, batch_size(batch) // self.group, step):
            part = cut(batch, start * self.group, (start + step) * self.group)
            v = None if cotangent is None else cotangent[start : start + step]
            with self._isolated():
                rows = self._rows(part, leaves, v) if vectorized else self._row(part, leaves, v)
            yield {name: each.detach() for name, each in rows.items()}

    def _row(self, sample: Batch, leaves: dict[str, Tensor], v: Tensor | None) -> dict[str, Tensor]:
        trainable = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        with torch.enable_grad():
            value = self._value(trainable, sample, v)
            if not value.requires_grad:  # it depends on none of them
                return {name: torch.zeros_like(leaf)[None] for name, leaf in leaves.items()}
            gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return {name: g.unsqueeze(0) for name, g in zip(leaves, gradients, strict=True)}

    def _rows(
        self, samples: Batch, leaves: dict[str, Tensor], v: Tensor | None
    ) -> dict[str, Tensor]:
        rows = map_tensors(samples, lambda tensor: tensor.unflatten(0, (-1, self.group)))
        axis, v = (None, None) if v is None else (0, v.unsqueeze(1))
        with warnings.catch_warnings():
            # An operation that vmap loops over (attention on a CPU) is slower, not wrong.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return vmap(grad(self._value), in_dims=(None, 0, axis))(leaves, rows, v)

    def _value(self, trainable: dict[str, Tensor], sample: Batch, v: Tensor | None) -> Tensor:
        others = {name: leaf.detach() for name, leaf in self.leaves.items()}
        evaluated = self._evaluated({**others, **trainable}, sample)
        if v is not None:
            return (evaluated.logits * v).sum()
        # Of a sample without terms the mean is NaN, with a gradient of NaN.
        terms = evaluated.terms.sum()
        scale = terms.clamp_max(1) if self.losses.average else terms
        return torch.where(terms > 0, evaluated.loss, torch.zeros_like(evaluated.loss)) * scale

    def _evaluated(self, leaves: Mapping[str, Tensor], batch: Batch) -> Evaluated:
        with torch.enable_grad():
            output, target = self._functional.output(leaves, self._constants, batch)
            loss = self._functional.loss_of(output, target)
        return self.losses.evaluated(output, target, loss, batch)

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        with preserved(self.calibration.model), self._randomness:
            yield
