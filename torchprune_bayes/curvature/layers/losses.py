"""What is differentiated: the loss itself, or products with its second derivative's square root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from torchprune_bayes.calibration import Batch, batch_size
from torchprune_bayes.calibration._functional import LossFunction
from torchprune_bayes.calibration._targets import _label_shift
from torchprune_bayes.errors import CalibrationError


@dataclass(frozen=True)
class Evaluated:
    """A batch that went through the model.

    Attributes:
        output: What the model returned.
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
        return self.loss.detach() * terms if terms else torch.zeros_like(self.loss)


@dataclass(frozen=True)
class SampleLosses:
    """How a batch's mean loss is made of losses of samples, and these of the model's output.

    Attributes:
        loss_fn: ``loss_fn(output, target)``, or ``None`` for the model's own.
        shift: Places by which the loss moves labels against logits: 1 for language models.
        is_cross_entropy: Whether the loss is the mean cross-entropy of the logits.
        average: Whether the loss of a sample is the mean of its terms, and not their sum.
        ignore_index: Label without a term in the loss.
        group: Samples of a mini-batch, which is taken for one sample.
    """

    loss_fn: LossFunction | None
    shift: int
    is_cross_entropy: bool
    average: bool
    ignore_index: int
    group: int = 1

    def evaluated(self, output: Any, target: Any, loss: Tensor, batch: Batch) -> Evaluated:
        """Count the terms of a batch and note what it gave."""
        if isinstance(batch, Mapping):
            target = batch.get("labels")
        logits = getattr(output, "logits", output)
        terms = self._terms(target, loss, batch)
        if self.group > 1:
            terms = terms.unflatten(0, (-1, self.group)).sum(1)
        return Evaluated(output, logits, target, loss, terms)

    def weights(self, terms: Tensor) -> Tensor:
        """``[B]``: what turns the gradient of the mean loss, sample by sample, into the sample's.

        The batch's loss is ``Σ_n ℓ_n / M`` with sums ``ℓ_n`` over the ``m_n`` terms of a sample,
        ``M = Σ m_n``; wanted are the gradients of ``ℓ_n``, or of the averages ``ℓ_n / m_n``.
        """
        weights = terms.sum().expand(len(terms))
        return weights / terms.clamp_min(1) if self.average else weights

    def sampled(self, batch: Evaluated, generator: torch.Generator) -> Tensor:
        """``v [B, ..., C]`` with ``E[v_n v_nᵀ] = ∂²ℓ_n/∂f_n²`` for the outputs ``f``.

        For a cross-entropy, ``softmax(f)`` less a label drawn from it; otherwise ``S z`` with
        ``S Sᵀ`` the second derivative and independent signs ``z``.
        """
        if self.is_cross_entropy:
            return self._drawn_residuals(batch, generator)
        root = self.root(batch)
        signs = torch.randint(2, root[..., 0].shape, generator=generator).to(root) * 2 - 1
        return (root @ signs.unsqueeze(-1)).squeeze(-1)

    def root(self, batch: Evaluated) -> Tensor:
        """``S [B, C, C]`` with ``S_n S_nᵀ = ∂²ℓ_n/∂f_n²``.

        Raises:
            CalibrationError: If the output is not ``[B, C]``, or there is no ``loss_fn``.
        """
        logits = batch.logits
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = tuple(getattr(logits, "shape", ()))
            raise CalibrationError(
                "Expected outputs [B, C] for second derivatives of the loss, got shape "
                f"{found}: take kind='monte_carlo' with a cross-entropy, or kind='empirical'."
            )
        if self.is_cross_entropy:
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

    def _drawn_residuals(self, batch: Evaluated, generator: torch.Generator) -> Tensor:
        dtype = torch.promote_types(batch.logits.dtype, torch.float32)
        p = batch.logits.detach().to(dtype).softmax(-1)
        uniform = torch.rand(p.shape[:-1], generator=generator).to(p).unsqueeze(-1)
        drawn = (p.cumsum(-1) < uniform).sum(-1).clamp_max(p.shape[-1] - 1)
        counted = batch.target != self.ignore_index
        if self.shift:
            counted = pad(counted[..., self.shift :], (0, self.shift))
        residuals = (p - one_hot(drawn, p.shape[-1])) * counted.unsqueeze(-1)
        if self.average:
            terms = batch.terms.clamp_min(1).view(-1, *[1] * (p.ndim - 1))
            residuals = residuals / terms
        return residuals.to(batch.logits.dtype)

    def _terms(self, target: Any, loss: Tensor, batch: Batch) -> Tensor:
        if not isinstance(target, Tensor) or target.is_floating_point():
            return torch.ones(batch_size(batch), device=loss.device, dtype=loss.dtype)
        labels = target[..., self.shift :] if self.shift else target
        return (labels != self.ignore_index).reshape(len(labels), -1).sum(1).to(loss)


def losses_of(
    output: Any,
    target: Any,
    loss: Tensor,
    batch: Batch,
    loss_fn: LossFunction | None,
    *,
    average: bool,
    ignore_index: int,
    group: int = 1,
) -> SampleLosses:
    """Find out, from one evaluated batch, what the loss does with logits and labels."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else target
    logits = getattr(output, "logits", output)
    shift = _shift_of(logits, labels, loss)
    return SampleLosses(loss_fn, shift or 0, shift is not None, average, ignore_index, group)


def _shift_of(logits: Any, labels: Any, loss: Tensor) -> int | None:
    fits = isinstance(logits, Tensor) and isinstance(labels, Tensor)
    if not fits or labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return None
    if int(labels.max()) >= logits.shape[-1]:  # they number something else than classes
        return None
    try:
        return _label_shift(loss.detach(), logits.detach(), labels)
    except CalibrationError:
        return None


def _numerical_root(
    loss_fn: Callable[[Any, Any], Tensor], outputs: Tensor, target: Any, terms: Tensor
) -> Tensor:
    f = outputs.requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss_fn(f, target) * terms, f, create_graph=True)
        rows = [
            torch.autograd.grad(column.sum(), f, retain_graph=True, materialize_grads=True)[0]
            if column.requires_grad
            else torch.zeros_like(f)
            for column in slope.unbind(1)
        ]
    values, vectors = torch.linalg.eigh(torch.stack(rows, dim=1))
    return vectors * values.clamp_min(0).sqrt().unsqueeze(1)


def cotangents(
    kind: str,
    losses: SampleLosses,
    batch: Evaluated,
    draws: int,
    generator: torch.Generator,
) -> Iterator[Tensor | None]:
    """What the outputs' gradients are set to, one backward pass each; ``None`` for the loss's own.

    The squares, or outer products, of the gradients of all passes are to be summed.
    """
    if kind == "empirical":
        yield None
    elif kind == "monte_carlo":
        for _ in range(draws):
            yield losses.sampled(batch, generator) / draws**0.5
    else:
        yield from losses.root(batch).to(batch.logits.dtype).unbind(2)
