"""What is differentiated: the loss, or products with the root of its second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from torchprune_bayes._numerics.precision import float64_device
from torchprune_bayes.calibration import Batch, LabelLayout, LossFunction, batch_size
from torchprune_bayes.calibration.normalisation import Normaliser, counted_labels, labels_in
from torchprune_bayes.errors import CalibrationError


@dataclass(frozen=True)
class Evaluated:
    """A batch that went through the model.

    Attributes:
        output: Output of the model.
        logits: The tensor in it, ``[B, ..., C]``.
        target: The labels.
        loss: Mean loss, a scalar with a graph.
        terms: ``[B]``, the terms of every sample, or mini-batch, that ``loss`` is the mean of.
    """

    output: Any
    logits: Any
    target: Any
    loss: Tensor
    terms: Tensor

    @property
    def total_loss(self) -> Tensor:
        """Sum of all terms; zero, not NaN, where there are none."""
        terms = self.terms.sum()
        return torch.where(terms > 0, self.loss.detach() * terms, 0.0)


@dataclass(frozen=True)
class SampleLosses:
    """Decomposition of a batch's mean loss into per-sample losses of the model's output.

    Attributes:
        loss_fn: ``loss_fn(output, target)``, or ``None`` for the model's own.
        layout: How the loss reads logits and labels, where it is a mean log-likelihood of these.
        average: Whether the loss of a sample is the mean of its terms, and not their sum.
        ignore_index: Label without a term in the loss.
        group: Samples of a mini-batch, which counts as one sample.
        normaliser: The rule by which the batch's loss is a mean.
    """

    loss_fn: LossFunction | None
    layout: LabelLayout | None
    average: bool
    ignore_index: int
    group: int = 1
    normaliser: Normaliser = "terms"

    def evaluated(self, output: Any, target: Any, loss: Tensor, batch: Batch) -> Evaluated:
        """Count the terms of a batch and record its results."""
        labels = labels_in(batch)
        target = labels if target is None else target
        logits = getattr(output, "logits", output)
        terms = self._terms(target, batch_size(batch), loss)
        if self.group > 1:
            terms = terms.unflatten(0, (-1, self.group)).sum(1)
        return Evaluated(output, logits, target, loss, terms)

    def weights(self, terms: Tensor) -> Tensor:
        """``[B]``: factors that turn the gradients of the mean loss into those of single samples.

        The batch's loss is ``Σ_n ℓ_n / M`` with sums ``ℓ_n`` over the ``m_n`` terms of a sample,
        ``M = Σ m_n``; wanted are the gradients of ``ℓ_n``, or of the averages ``ℓ_n / m_n``.
        """
        weights = terms.sum().expand(len(terms))
        return weights / terms.clamp_min(1) if self.average else weights

    def sampled(self, batch: Evaluated, generator: torch.Generator) -> Tensor:
        """``v``, shaped like the outputs ``f``, with ``E[v_n v_nᵀ] = ∂²ℓ_n/∂f_n²``.

        For a log-likelihood of labels, the predictions less labels drawn from them; otherwise
        ``S z`` with ``S Sᵀ`` the second derivative and independent signs ``z``.

        Raises:
            CalibrationError: If the loss is not a log-likelihood, and the output not ``[B, C]``.
        """
        if self.layout is not None:
            return self._drawn_residuals(self.layout, batch, generator)
        root = self.root(batch, "kind='empirical', or a mean cross-entropy as the loss")
        signs = torch.randint(2, root[..., 0].shape, generator=generator).to(root) * 2 - 1
        return (root @ signs.unsqueeze(-1)).reshape(batch.logits.shape)

    def root(self, batch: Evaluated, instead: str) -> Tensor:
        """``S [B, C, C]`` with ``S_n S_nᵀ = ∂²ℓ_n/∂f_n²``; outputs ``[B]`` have ``C = 1``.

        Args:
            batch: The evaluated batch.
            instead: Recommendation in the error.

        Raises:
            CalibrationError: If the output is not ``[B, C]`` or ``[B]``, or there is no
                ``loss_fn``.
        """
        logits = batch.logits
        if not isinstance(logits, Tensor) or logits.ndim not in (1, 2):
            shape = tuple(getattr(logits, "shape", ()))
            raise CalibrationError(
                "Expected outputs [B, C] or [B] for second derivatives of the loss, got shape "
                f"{shape}: take {instead}."
            )
        if self.layout == LabelLayout(-1, 0, self.ignore_index):
            p = logits.detach().to(batch.loss).softmax(-1)
            # (D - p1ᵀD)(D - p1ᵀD)ᵀ with D = diag(√p), because Σp = 1
            root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
            return root * (batch.terms > 0).to(root).view(-1, 1, 1)
        if self.loss_fn is None:
            raise CalibrationError(
                "Expected a loss_fn, or a model whose own loss is a mean cross-entropy, for "
                f"second derivatives of the loss, got {float(batch.loss):.6g} as the model's loss."
            )
        return _numerical_root(self.loss_fn, logits.detach(), batch.target, batch.terms.sum())

    def _drawn_residuals(
        self, layout: LabelLayout, batch: Evaluated, generator: torch.Generator
    ) -> Tensor:
        dtype = torch.promote_types(batch.logits.dtype, torch.float32)
        logits = batch.logits.detach().to(dtype)
        drawn, last = layout.draw(logits, generator), layout.classes_last(logits)
        if layout.classes is None:
            # A sample's loss is the mean over its labels, and so is its second derivative.
            residuals = (last.sigmoid() - drawn) / (last[0].numel() ** 0.5)
            return residuals.to(batch.logits.dtype)
        p = last.softmax(-1)
        residuals = (p - one_hot(drawn, p.shape[-1])) * layout.counted(batch.target).unsqueeze(-1)
        if self.average:
            terms = batch.terms.clamp_min(1).view(-1, *[1] * (p.ndim - 1))
            residuals = residuals / terms
        return layout.as_logits(residuals).to(batch.logits.dtype)

    def _terms(self, target: Any, samples: int, loss: Tensor) -> Tensor:
        shift = self.layout.shift if self.layout else 0
        counts = counted_labels(target, self.ignore_index, shift)
        binary = self.layout is not None and self.layout.classes is None
        if counts is None or binary or self.normaliser == "samples":
            return torch.ones(samples, device=loss.device, dtype=loss.dtype)
        return counts.to(loss)


def _numerical_root(
    loss_fn: Callable[[Any, Any], Tensor], outputs: Tensor, target: Any, terms: Tensor
) -> Tensor:
    f = outputs.reshape(len(outputs), -1).requires_grad_()
    with torch.enable_grad():
        loss = loss_fn(f.view(outputs.shape), target) * terms
        (slope,) = torch.autograd.grad(loss, f, create_graph=True)
        rows = [
            torch.autograd.grad(column.sum(), f, retain_graph=True, materialize_grads=True)[0]
            if column.requires_grad
            else torch.zeros_like(f)
            for column in slope.unbind(1)
        ]
    hessian = torch.stack(rows, dim=1)
    values, vectors = torch.linalg.eigh(hessian.to(float64_device(hessian.device)))
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).to(hessian)


def cotangents(
    kind: str,
    losses: SampleLosses,
    batch: Evaluated,
    draws: int,
    generator: torch.Generator,
) -> Iterator[Tensor | None]:
    """Output gradients, one backward pass each; ``None`` for the loss's own.

    The squares, or outer products, of the gradients of all passes are to be summed.
    """
    if kind == "empirical":
        yield None
    elif kind == "monte_carlo":
        for _ in range(draws):
            yield losses.sampled(batch, generator) / draws**0.5
    else:
        instead = "kind='monte_carlo' with a mean cross-entropy, or kind='empirical'"
        root = losses.root(batch, instead).to(batch.logits.dtype)
        for column in root.unbind(2):
            yield column.reshape(batch.logits.shape)
