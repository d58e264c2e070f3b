"""Results of :class:`~torchprune_bayes.curvature.LayerCurvature`: sums over samples."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from torchprune_bayes._files import read_tensors, reading, save_tensors
from torchprune_bayes._numerics.kronecker import (
    DiagonalInverse,
    KroneckerInverse,
    kronecker_inverses,
)
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature.layers.sums import layer_of
from torchprune_bayes.errors import AlignmentError, ArgumentError, ParameterError
from torchprune_bayes.types import Masks

if TYPE_CHECKING:
    from typing_extensions import Self


class LayerStatistics:
    """Fitted curvature: diagonals and Kronecker factors by qualified name of the parameter.

    Attributes:
        calibration: Where the samples came from; ``None`` after :meth:`load`.
        masks: Entries that remained in the fit, by qualified name.
        count: Number of samples ``N``.
        sums: Sums over the samples, in the calibration's dtype: ``"diagonal:<parameter>"``,
            ``"inputs:<layer>"`` and ``"outputs:<layer>"`` with ``"positions:<layer>"``, ``"terms"``
            and ``"loss:<kind>"``.
        coverage: How gradients were computed, by qualified name; empty after :meth:`load`.
        kind: Kind of the matrix.
    """

    calibration: Calibration | None = None
    coverage: Mapping[str, str] = {}
    masks: Masks
    count: int
    sums: dict[str, Tensor]
    kind: str

    @property
    def loss_sum(self) -> float:
        """Sum of the loss over all samples (over all their terms)."""
        return float(self.sums[f"loss:{self.kind}"])

    @property
    def num_terms(self) -> int:
        """Terms of the loss: samples, or labels that are not ignored."""
        return int(self.sums["terms"])

    @property
    def kronecker_names(self) -> list[str]:
        """Qualified names of the parameters that have Kronecker factors."""
        return [name for name in self.masks if self._has_factors(name)]

    def diagonal(self) -> dict[str, Tensor]:
        """``H_ii``, a mean over samples, by qualified name; zero where an entry is pruned.

        Times the number of training samples this is the curvature of the summed loss, whatever
        part of them it was fitted to. With structure ``"kronecker"`` the parameters with factors
        are not in it.
        """
        prefix = "diagonal:"
        return {
            key.removeprefix(prefix): value / self.count
            for key, value in self.sums.items()
            if key.startswith(prefix)
        }

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors ``R, C`` of the block of one parameter, ``H ≈ R ⊗ C``, a mean over samples.

        ``R`` is over the first dimension of the parameter and ``C`` over the others: ``G`` and
        ``A`` for a weight ``[out, in]``, ``A`` and ``G`` for the ``[in, out]`` of Hugging Face's
        ``Conv1D``; for a bias they are ``G`` and 1. See :meth:`input_factor` and
        :meth:`output_factor` for the two by what they belong to.

        Raises:
            ParameterError: If the parameter has no factors.
        """
        outputs, inputs = self.output_factor(name), self.input_factor(name)
        inputs_first = f"inputs first:{layer_of(name)}" in self.sums and not name.endswith("bias")
        return (inputs, outputs) if inputs_first else (outputs, inputs)

    def input_factor(self, name: str) -> Tensor:
        """``A = (1/NT) Σ a aᵀ``, the second moment of the layer's inputs, ``[in, in]``.

        For a convolution these are patches, ``[in * kernel, in * kernel]``; for a bias 1.

        Raises:
            ParameterError: If the parameter has no factors.
        """
        layer = self._layer_with_factors(name)
        outputs = self.sums[f"outputs:{layer}"]
        if name.endswith("bias"):
            return torch.ones_like(outputs[:1, :1])
        # A layer that is never called has no positions, and its factors are zero.
        return self.sums[f"inputs:{layer}"] / self.sums[f"positions:{layer}"].clamp_min(1)

    def output_factor(self, name: str) -> Tensor:
        """``G = (1/N) Σ g gᵀ`` of the gradients by the layer's outputs, ``[out, out]``.

        Raises:
            ParameterError: If the parameter has no factors.
        """
        return self.sums[f"outputs:{self._layer_with_factors(name)}"] / self.count

    def block_diagonal(self, name: str) -> Tensor:
        """``H_ii`` of one parameter, shaped like it: from its factors, else its diagonal."""
        if self._has_factors(name):
            rows, columns = (factor.diagonal() for factor in self.factors(name))
            return torch.outer(rows, columns).reshape(self.masks[name].shape)
        return self.sums[f"diagonal:{name}"] / self.count

    def inverse(
        self, name: str, damping: float, *, pi: bool = True
    ) -> KroneckerInverse | DiagonalInverse:
        """Damped inverse of the block of one parameter, over its ``[first, others]`` dimensions.

        Args:
            name: Qualified name of the parameter.
            damping: ``λ``, absolute; see :meth:`mean`.
            pi: Whether Kronecker factors split the damping by their mean eigenvalues.
        """
        return self.inverses([name], damping, pi=pi)[name]

    def inverses(
        self, names: Collection[str], damping: float, *, pi: bool = True
    ) -> dict[str, KroneckerInverse | DiagonalInverse]:
        """Damped inverses of several blocks, with one device synchronisation for all.

        Args:
            names: Qualified names of the parameters.
            damping: See :meth:`inverse`.
            pi: See :meth:`inverse`.
        """
        known = [name for name in names if self._has_factors(name)]
        factored = kronecker_inverses([self.factors(name) for name in known], damping, pi=pi)
        inverses: dict[str, KroneckerInverse | DiagonalInverse] = dict(
            zip(known, factored, strict=True)
        )
        for name in names:
            if name not in inverses:
                diagonal = self.block_diagonal(name)
                inverses[name] = DiagonalInverse(diagonal.reshape(diagonal.shape[0], -1), damping)
        return inverses

    def mean(self) -> float:
        """Mean of ``H_ii`` over the remaining entries of all parameters: a unit for dampings."""
        totals = []
        for name, mask in self.masks.items():
            diagonal = self.block_diagonal(name)
            kept = mask.to(diagonal.device)
            totals.append(torch.stack([(diagonal * kept).sum(), kept.sum().to(diagonal)]))
        total, remaining = torch.stack(totals).sum(0).tolist()
        return float(total / max(remaining, 1.0))

    def merge(self, other: Self) -> Self:
        """Add the sums of another fit of the same weights, such as another rank's.

        Raises:
            AlignmentError: If the two are not of the same kind, structure and remaining entries.
        """
        if self.sums.keys() != other.sums.keys() or list(self.masks) != list(other.masks):
            raise AlignmentError(
                "Expected curvatures of one kind and structure of the same tensors, got two."
            )
        self.check_fitted_to(other.masks)
        for key, value in other.sums.items():
            self.sums[key] = self.sums[key] + value.to(self.sums[key].device)
        self.count += other.count
        return self

    def all_reduce(self, group: Any = None) -> Self:
        """Add up the sums of all processes of a ``torch.distributed`` group, in each of them.

        Raises:
            AlignmentError: In all of them, if they are not of the same kind, structure and layers.
        """
        gathered: list[Any] = [None] * distributed.get_world_size(group)
        shapes = [(key, value.shape) for key, value in self.sums.items()]
        distributed.all_gather_object(gathered, shapes, group=group)
        if any(other != shapes for other in gathered):
            raise AlignmentError("Expected the same curvatures in all processes, got others.")
        count = torch.tensor(float(self.count), dtype=torch.float64)
        count = count.to(next(iter(self.sums.values())).device)
        for tensor in (count, *self.sums.values()):
            distributed.all_reduce(tensor, group=group)
        self.count = round(float(count))
        return self

    def check_fitted_to(self, masks: Masks) -> None:
        """Refuse tensors that this was not fitted to, or other entries of them.

        Raises:
            AlignmentError: If the remaining entries ``masks`` are not those of the fit.
        """
        for name, mask in masks.items():
            fitted = self.masks.get(name)
            if fitted is None or not torch.equal(fitted.to(mask.device), mask):
                got = "no such tensor" if fitted is None else "other entries"
                raise AlignmentError(
                    f"Expected a curvature fitted to the remaining entries of `{name}`, got "
                    f"{got}: fit it again."
                )

    def save(self, path: str | Path) -> None:
        """Write sums and masks as one safetensors file."""
        tensors = {f"mask:{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"sum:{key}": value for key, value in self.sums.items()}
        metadata = {
            "kind": type(self).__name__,
            "count": str(self.count),
            "masks": json.dumps(list(self.masks)),
            "sums": json.dumps(list(self.sums)),
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Read what :meth:`save` wrote; needs neither model nor data.

        Args:
            path: The file.
            device: Where the tensors are put.

        Raises:
            ArgumentError: If the file is missing, damaged, or holds something else.
        """
        stored = read_tensors(path, f"a {cls.__name__}")
        kind = stored.metadata.get("kind", "something else")
        if kind != cls.__name__:
            raise ArgumentError(f"Expected a file of {cls.__name__}, got one of {kind}.")
        masks, sums = stored.prefixed("mask:"), stored.prefixed("sum:")
        statistic = cls()
        with reading(path, f"a {cls.__name__}"):
            statistic.count = int(stored.metadata["count"])
            statistic.masks = {name: masks[name] for name in stored.json("masks", list)}
            statistic.sums = {key: sums[key] for key in stored.json("sums", list)}
            statistic.kind = next(key[5:] for key in sums if key.startswith("loss:"))
        return statistic.to(device)

    def to(self, device: torch.device | str) -> Self:
        """Move masks and sums to a device, in place; returns itself."""
        self.masks = {name: mask.to(device) for name, mask in self.masks.items()}
        self.sums = {key: value.to(device) for key, value in self.sums.items()}
        return self

    def _has_factors(self, name: str) -> bool:
        layer, _, own = name.rpartition(".")
        return f"outputs:{layer}" in self.sums and own in ("weight", "bias")

    def _layer_with_factors(self, name: str) -> str:
        if name not in self.masks or not self._has_factors(name):
            raise ParameterError(
                f"Expected a parameter with Kronecker factors, got {name!r}; there are "
                f"{', '.join(self.kronecker_names) or 'none'}."
            )
        return layer_of(name)
