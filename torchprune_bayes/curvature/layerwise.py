"""Curvature of all layers from one pass: exact diagonals and Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from torchprune_bayes._checks import check_choice, check_count
from torchprune_bayes.calibration import Batch, Calibration, batch_size
from torchprune_bayes.calibration._batches import cut, map_tensors
from torchprune_bayes.calibration._functional import LossFunction
from torchprune_bayes.curvature._sample_sums import SampleSums
from torchprune_bayes.curvature.layers.coverage import (
    coverage_of,
    unverified_routes,
    verified_routes,
)
from torchprune_bayes.curvature.layers.parameters import trainable_parameters
from torchprune_bayes.curvature.layers.passes import Passes, Routes
from torchprune_bayes.curvature.layers.sums import BatchSums, layer_of
from torchprune_bayes.errors import AlignmentError, ParameterError
from torchprune_bayes.types import Masks, ParameterPairs

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS = ("empirical", "monte_carlo", "ggn")
STRUCTURES = ("diagonal", "kronecker", "both")


class LayerCurvature(SampleSums):
    """Diagonal and Kronecker-factored Fisher or Gauss-Newton matrix of whole batches at a time.

    Forward hooks keep the inputs ``a`` of the layers, one backward pass gives the gradients ``g``
    by their outputs, and from the two follow the gradients of every single sample, which are
    squared and summed without being held together. With ``ℓ_n`` the loss of a sample and ``f_n``
    the model's output for it, the matrix is ``H = (1/N) Σ_n`` of

    - ``"empirical"``: ``∇ℓ_n ∇ℓ_nᵀ`` with the labels of the data (the empirical Fisher),
    - ``"ggn"``: ``J_nᵀ (∂²ℓ_n/∂f_n²) J_n`` (generalised Gauss-Newton; for cross-entropy and squared
      error the Fisher), one backward pass per output,
    - ``"monte_carlo"``: an unbiased estimate of the latter, ``draws`` backward passes.

    Kronecker factors are those of `K-FAC <https://arxiv.org/abs/1503.05671>`_, with positions of a
    sample (pixels, tokens) taken as independent (`arXiv 1602.01407
    <https://arxiv.org/abs/1602.01407>`_, the "expand" setting of `arXiv 2311.00636
    <https://arxiv.org/abs/2311.00636>`_)::

        H_W ≈ G ⊗ A,    G = (1/N) Σ_n Σ_t g_nt g_ntᵀ,    A = (1/NT) Σ_n Σ_t a_nt a_ntᵀ,    H_b ≈ G

    *What a sample is.* An entry of a batch's first dimension, a sequence for a language model; what
    happens within it is added up before it is squared. Its loss is the batch loss of it alone,
    except that where labels are sequences and the loss is their mean over a batch, it is the sum
    over the sample's own labels (``token_loss="sum"``): minus the log-likelihood of the sequence.

    *Which layers.* Linear, Hugging Face's ``Conv1D``, convolutions, embeddings, layer, RMS, group
    and (in eval mode) batch norms; weights that are tied, or used twice, have one gradient. All
    are checked on two samples against autograd. Parameters that this fails for, and those of other
    layers, are given to the model in one copy per sample if it broadcasts them (class tokens,
    position embeddings, layer scales), and else differentiated sample by sample, which is slow;
    ``coverage`` says which.

    Args:
        kind: ``"empirical"``, ``"monte_carlo"`` or ``"ggn"``.
        structure: ``"diagonal"``; ``"kronecker"``: factors of linear layers and convolutions, and
            the diagonal of all else; or ``"both"``: these factors, and the diagonal of everything.
        draws: Labels drawn per sample for ``"monte_carlo"``.
        token_loss: ``"sum"`` or ``"mean"`` over the labels of a sample.
        ignore_index: Label that does not count.
        factor_limit: Rows of a Kronecker factor at most; larger layers have a diagonal.
        batch_size: Samples of a pass at most; batches of the data are not joined.
        stream: Labels are drawn apart in every stream: ranks that share the data out, and add up
            what they found, take one each.
        verify: Whether the rules are checked on two samples, once for a model: not again where the
            same parameters are fitted by this object again.

    Attributes:
        calibration: Where the samples came from; ``None`` after ``load``.
        masks: Entries that were alive, by qualified name.
        count: ``N``.
        sums: Sums over the samples, in the calibration's dtype: ``"diagonal:<parameter>"``,
            ``"inputs:<layer>"`` and ``"outputs:<layer>"`` with ``"positions:<layer>"``, ``"terms"``
            and ``"loss:<kind>"``.
        coverage: How gradients were found, by qualified name; empty after ``load``.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> data = [(torch.randn(16, 3), torch.randint(2, (16,)))]
        >>> curvature = LayerCurvature("ggn", "both")
        >>> curvature = curvature.fit_model(model, data, nn.functional.cross_entropy)
        >>> curvature.diagonal()["0.weight"].shape, curvature.count
        (torch.Size([4, 3]), 16)
        >>> [tuple(factor.shape) for factor in curvature.factors("0.weight")]
        [(4, 4), (3, 3)]
        >>> curvature.coverage["2.bias"]
        'Linear'
    """

    coverage: Mapping[str, str] = {}
    _routes: Routes

    def __init__(
        self,
        kind: str = "empirical",
        structure: str = "diagonal",
        *,
        draws: int = 1,
        token_loss: str = "sum",
        ignore_index: int = -100,
        factor_limit: int = 8192,
        batch_size: int = 64,
        stream: int = 0,
        verify: bool = True,
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_choice("structure", structure, STRUCTURES)
        check_choice("token_loss", token_loss, ("sum", "mean"))
        for name, value in {"draws": draws, "batch_size": batch_size}.items():
            check_count(name, value)
        check_count("factor_limit", factor_limit)
        check_count("stream", stream, minimum=0)
        self.kind = kind
        self.structure = structure
        self.draws = draws
        self.token_loss = token_loss
        self.ignore_index = ignore_index
        self.factor_limit = factor_limit
        self.batch_size = batch_size
        self.stream = stream
        self.verify = verify

    def fit_model(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        loss_fn: LossFunction | None = None,
        params: ParameterPairs | None = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> Self:
        """Sum over batches at the model's own weights, as within a training loop; returns itself.

        Modes, gradients, buffers, random states and hooks of the model stay as they are.

        Args:
            model: The model; wrappers are looked through.
            data: Batches as for :class:`~torchprune_bayes.calibration.Calibration`.
            loss_fn: Mean loss, likewise.
            params: ``(module, name)`` pairs; default :func:`trainable_parameters`.
            num_samples: Samples to draw; default all.
            seed: Seeds their drawing.
            device: Where to compute; default where the model is.

        Raises:
            CalibrationError: If the curvature is not finite, or the data ends too early.
        """
        pairs = trainable_parameters(model) if params is None else params
        calibration = Calibration(
            model,
            data,
            loss_fn,
            pairs,
            num_samples,
            seed=seed,
            device=device,
            check_deterministic=False,
        )
        return self.fit(calibration)

    def fit(
        self,
        calibration: Calibration,
        weights: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> Self:
        """Sum over the calibration samples at ``weights``; returns itself.

        Args:
            calibration: Data, model and loss. Covered are its parameters, by default weights alone;
                for all, give it :func:`trainable_parameters`.
            weights: Values by qualified name; default the model's own.
            masks: Live entries; default those of the model.

        Raises:
            CalibrationError: If the curvature is not finite, or there are too few samples.

        Cost: for ``"empirical"`` and ``"monte_carlo"`` with one draw about the time of one to two
        training passes; memory as for training with this batch size, and the sums: a number per
        entry, or ``in² + out²`` per layer.
        """
        masks = calibration.space.masks() if masks is None else masks
        calibration = calibration.with_space(calibration.space.subset(masks))
        batches = calibration.fisher_batches(weights, self.batch_size)
        first = next(batches)
        passes = self._passes(calibration, weights, first)
        routes = self._routes_of(passes, first)
        total = BatchSums(
            passes,
            routes,
            kind=self.kind,
            structure=self.structure,
            draws=self.draws,
            stream=self.stream,
            factor_limit=self.factor_limit,
        )
        samples = 0
        for batch in chain([first], batches):
            total.add(batch)
            samples += batch_size(batch)
        sums = total.finished(masks)
        self.masks, self.sums, self.count = masks, sums, samples
        self.coverage, self.calibration = coverage_of(routes, masks), calibration
        self._routes = routes
        return self

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
        return [
            name
            for name in self.masks
            if f"outputs:{layer_of(name)}" in self.sums
            and name.rpartition(".")[2] in ("weight", "bias")
        ]

    def diagonal(self) -> dict[str, Tensor]:
        """``H_ii``, a mean over samples, by qualified name; zero where an entry was not alive.

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
        ``Conv1D``; for a bias they are ``G`` and 1.

        Raises:
            ParameterError: If the parameter has no factors.
        """
        if name not in self.kronecker_names:
            raise ParameterError(
                f"Expected a parameter with Kronecker factors, got {name!r}; there are "
                f"{', '.join(self.kronecker_names) or 'none'}."
            )
        layer = layer_of(name)
        outputs = self.sums[f"outputs:{layer}"] / self.count
        if name.endswith("bias"):
            return outputs, torch.ones_like(outputs[:1, :1])
        inputs = self.sums[f"inputs:{layer}"] / self.sums[f"positions:{layer}"]
        return (inputs, outputs) if f"inputs first:{layer}" in self.sums else (outputs, inputs)

    def merge(self, other: Self) -> Self:
        """Add the sums of another fit of the same weights, such as another rank's.

        Raises:
            AlignmentError: If the two are not of the same kind, structure and live entries.
        """
        if self.sums.keys() != other.sums.keys():
            raise AlignmentError("Expected curvatures of one kind and structure, got two.")
        return super().merge(other)

    def all_reduce(self, group: Any = None) -> Self:
        """Add up the sums of all processes of a ``torch.distributed`` group, in each of them.

        Raises:
            AlignmentError: In all of them, if they are not of the same kind, structure and layers.
        """
        found: list[Any] = [None] * distributed.get_world_size(group)
        shapes = [(key, value.shape) for key, value in self.sums.items()]
        distributed.all_gather_object(found, shapes, group=group)
        if any(other != shapes for other in found):
            raise AlignmentError("Expected the same curvatures in all processes, got others.")
        count = torch.tensor(float(self.count), dtype=torch.float64)
        count = count.to(next(iter(self.sums.values())).device)
        for tensor in (count, *self.sums.values()):
            distributed.all_reduce(tensor, group=group)
        self.count = round(float(count))
        return self

    @classmethod
    def load(cls, path: Any) -> Self:
        """Read what ``save`` wrote; needs neither model nor data."""
        statistic = super().load(path)
        statistic.kind = next(key[5:] for key in statistic.sums if key.startswith("loss:"))
        return statistic

    def _routes_of(self, passes: Passes, first: Batch) -> Routes:
        space, before = passes.calibration.space, self.calibration
        if not self.verify:
            return unverified_routes(space)
        if before is not None and before.model is space.model and before.pairs() == space.pairs():
            return self._routes
        return verified_routes(passes, self._two_of(first))

    def _two_of(self, batch: Batch) -> Batch:
        """Two samples, of those that have most labels that count."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return cut(batch, 0, 2)
        counts = (labels != self.ignore_index).reshape(len(labels), -1).sum(1)
        chosen = counts.argsort(descending=True, stable=True)[:2]
        return map_tensors(batch, lambda tensor: tensor[chosen])

    def _passes(
        self, calibration: Calibration, weights: Mapping[str, Tensor] | None, first: Batch
    ) -> Passes:
        average = self.token_loss == "mean"
        return Passes(
            calibration, weights, cut(first, 0, 2), average=average, ignore_index=self.ignore_index
        )
