"""Posteriors whose curvature spans several tensors: full and low-rank Hessians, subnetworks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._numerics.laplace_blocks import JointBlock, Precision
from torchprune_bayes._numerics.marginal_likelihood import EvidenceTerm, log_marginal_likelihood
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.laplace.evidence import maximise_evidence
from torchprune_bayes.laplace.posterior import Posterior, check_same_names
from torchprune_bayes.laplace.priors import PriorPrecision, PriorStructure


class JointPosterior(Posterior):
    """A posterior whose curvature spans several tensors, ``H = U diag(l) Uᵀ``.

    Args:
        mean: Weights by qualified name.
        vectors: ``U``, ``[entries, rank]``.
        values: ``l``, ``[rank]``, not negative.
        entries: For each tensor the flat positions of its entries in ``U``, in that order; default
            all. The others are held fixed.
        prior: As for :class:`Posterior`.
        likelihood: ``loss``, ``temperature`` and so on, as for :class:`Posterior`.

    Cost: ``entries · rank² + rank³`` multiplications for anything that needs the inverse.

    Example:
        >>> posterior = JointPosterior({"bias": torch.ones(2)}, torch.ones(2, 1), torch.ones(1) * 3)
        >>> posterior.precision("bias"), posterior.variance("bias")  # [[4, 3], [3, 4]]
        (tensor([4., 4.], dtype=torch.float64), tensor([0.5714, 0.5714], dtype=torch.float64))
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        vectors: Tensor,
        values: Tensor,
        entries: Mapping[str, Tensor] | None = None,
        prior: PriorPrecision | None = None,
        *,
        loss: float = 0.0,
        temperature: float = 1.0,
        noise: float | None = None,
        observations: int = 0,
        prior_mean: float | Mapping[str, Tensor] = 0.0,
    ) -> None:
        self._set(mean, prior, loss, temperature, noise, observations, prior_mean)
        if entries is None:
            entries = {name: torch.arange(value.numel()) for name, value in self.mean.items()}
        check_same_names(mean, entries)
        self._entries = {name: index.to(vectors.device) for name, index in entries.items()}
        total = sum(len(index) for index in self._entries.values())
        if len(vectors) != total:
            raise AlignmentError(f"Expected vectors of {total} entries, got {len(vectors)}.")
        self._joint = JointBlock(vectors, values)

    @property
    def is_exact(self) -> bool:
        """Always."""
        return True

    def precision(self, name: str, *, smoothed: bool = False) -> Tensor:
        """Diagonal of ``P`` for one tensor; infinite where an entry is held fixed."""
        return self._spread(
            name, self._joint.precisions(self._prior_vector(), self.scale), torch.inf
        )

    def curvature(self, name: str) -> Tensor:
        """Diagonal of ``sH`` for one tensor; infinite where an entry is held fixed."""
        return self._spread(name, self.scale * self._joint.diagonal(), torch.inf)

    def variance(self, name: str) -> Tensor:
        """Marginal variances of one tensor; zero where an entry is held fixed."""
        return self._spread(name, self._joint.variances(self._prior_vector(), self.scale), 0.0)

    def log_marginal_likelihood(self) -> float:
        """``log Z``."""
        pairs = [(self._term(), self._prior_vector())]
        return log_marginal_likelihood(self.log_likelihood, pairs, self.scale)

    def effective_parameters(self) -> float:
        """``Σγ``, how many parameters the data determine."""
        return float(self._joint.effective_parameters(self._prior_vector(), self.scale).sum())

    def with_best_prior(
        self, structure: str | PriorStructure | None = None, **options: Any
    ) -> Posterior:
        """The same curvature and weights under the scalar prior of highest evidence.

        Raises:
            ArgumentError: If ``structure`` is not ``"scalar"``.
        """
        if PriorStructure.of(structure or self.prior.structure) is not PriorStructure.SCALAR:
            raise ArgumentError(
                "Expected the structure 'scalar' for a curvature that spans several tensors, got "
                f"{structure or self.prior.structure.value!r}."
            )
        whole = PriorPrecision.constant({"": self._joint.shape}, "scalar")
        best = maximise_evidence(whole, {"": self._term()}, self.scale, **options)
        value = float(best.factors[""][0])
        return self.with_prior(PriorPrecision.constant(self.prior.shapes, "scalar", value))

    def _term(self) -> EvidenceTerm:
        parts = [self._centred(n).flatten()[index] for n, index in self._entries.items()]
        return EvidenceTerm(self._joint, torch.cat(parts).unsqueeze(1))

    def _prior_vector(self) -> Precision:
        parts = [self.prior.values(n).flatten()[index] for n, index in self._entries.items()]
        return Precision((torch.cat(parts).double().unsqueeze(1),), self._joint.shape)

    def _spread(self, name: str, vector: Tensor, fixed: float) -> Tensor:
        lengths = [len(index) for index in self._entries.values()]
        own = vector.flatten().split(lengths)[self.names.index(name)]
        full = torch.full_like(self.mean[name], fixed, dtype=torch.float64).flatten()
        return full.index_copy(0, self._entries[name], own).reshape(self.mean[name].shape)
