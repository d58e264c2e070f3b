"""Curvature of all layers from one pass: exact diagonals and Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_count
from torchprune_bayes.calibration import (
    IGNORED,
    Batch,
    Calibration,
    LossFunction,
    joined,
)
from torchprune_bayes.curvature.layer_statistics import LayerStatistics
from torchprune_bayes.curvature.layers.batches import (
    examples_of,
    first_of,
    whole_mini_batches,
)
from torchprune_bayes.curvature.layers.coverage import (
    coverage_of,
    unverified_routes,
    verified_routes,
)
from torchprune_bayes.curvature.layers.normalisation import MOST_EXAMPLES, NormalisationCheck
from torchprune_bayes.curvature.layers.parameters import trainable_parameters
from torchprune_bayes.curvature.layers.passes import Passes, Routes
from torchprune_bayes.curvature.layers.sums import BatchSums, needed
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.types import Masks, ParameterPairs

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["empirical", "monte_carlo", "ggn"]
Structure = Literal["diagonal", "kronecker", "both"]


class LayerCurvature(LayerStatistics):
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
    Whether a batch loss is a mean over labels or over samples is found out on samples that differ;
    what is neither (class weights, masks that the labels do not show) is refused.

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
        ignore_index: Label that does not count; default the calibration's.
        factor_limit: Rows of a Kronecker factor at most; larger layers have a diagonal.
        batch_size: Samples of a pass at most; batches of the data are not joined.
        mini_batch: Samples whose mean loss is differentiated as one, with ``"empirical"``: a sample
            above is then a mini-batch, and so it is in ``count``.
        stream: Labels are drawn apart in every stream: ranks that share the data out, and add up
            what they found, take one each.
        verify: Whether the rules are checked on two samples, once for a model: not again where the
            same parameters are fitted by this object again.
        positions: ``"summed"`` squares the gradients of samples; ``"independent"`` takes the
            positions of a sample (pixels, tokens) of linear layers, convolutions and embeddings as
            samples, as Kronecker factors do: diagonals are then ``(1/N) Σ_n Σ_t g_nt² a_nt²``, one
            matrix product for a layer.
        most_terms: Terms of the loss (labels) after which no batch follows; default all samples.

    Attributes are those of :class:`~torchprune_bayes.curvature.LayerStatistics`.

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

    _routes: Routes

    def __init__(
        self,
        kind: Kind = "empirical",
        structure: Structure = "diagonal",
        *,
        draws: int = 1,
        token_loss: Literal["sum", "mean"] = "sum",
        ignore_index: int | None = None,
        factor_limit: int = 8192,
        batch_size: int = 64,
        mini_batch: int = 1,
        stream: int = 0,
        verify: bool = True,
        positions: Literal["summed", "independent"] = "summed",
        most_terms: int | None = None,
    ) -> None:
        check_choice("kind", kind, get_args(Kind))
        check_choice("structure", structure, get_args(Structure))
        check_choice("token_loss", token_loss, ("sum", "mean"))
        for name, value in {"draws": draws, "batch_size": batch_size}.items():
            check_count(name, value)
        check_count("mini_batch", mini_batch)
        if mini_batch > 1 and kind != "empirical":
            raise ArgumentError(
                f"Expected kind='empirical' with mini-batches, got {kind!r}: the others are made "
                "of single samples."
            )
        check_count("factor_limit", factor_limit)
        check_count("stream", stream, minimum=0)
        check_choice("positions", positions, ("summed", "independent"))
        if most_terms is not None:
            check_count("most_terms", most_terms)
        self.kind = kind
        self.structure = structure
        self.draws = draws
        self.token_loss = token_loss
        self.ignore_index = ignore_index
        self.factor_limit = factor_limit
        self.batch_size = batch_size
        self.mini_batch = mini_batch
        self.stream = stream
        self.verify = verify
        self.positions = positions
        self.most_terms = most_terms

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
            "all" if num_samples is None else num_samples,
            seed=seed,
            device=device,
            ignore_index=IGNORED if self.ignore_index is None else self.ignore_index,
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
            masks: Remaining entries; default those of the model.

        Raises:
            CalibrationError: If the curvature is not finite, or there are too few samples.

        Cost: for ``"empirical"`` and ``"monte_carlo"`` with one draw about the time of one to two
        training passes; memory as for training with this batch size, and the sums: a number per
        entry, or ``in² + out²`` per layer.
        """
        masks = calibration.space.masks() if masks is None else masks
        calibration = calibration.with_space(calibration.space.subset(masks))
        batches = partial(
            whole_mini_batches, calibration, weights, self.batch_size, self.mini_batch
        )
        head = first_of(batches(), self.mini_batch)
        passes = self._passes(calibration, weights, head[0])
        check = NormalisationCheck(passes)
        if self.verify:
            check.examine(joined(head) or head[0])
        apart: set[str] = set()
        total = None
        while total is None:
            routes = self._routes_of(passes, head[0], check.couples, apart)
            total = self._summed(passes, check, routes, batches(), apart)
        sums = total.finished(masks)
        self.masks, self.sums, self.count = masks, sums, total.samples
        self.coverage = coverage_of(total.routes, masks)
        self.calibration: Calibration | None = calibration
        self._routes = routes
        return self

    def _summed(
        self,
        passes: Passes,
        check: NormalisationCheck,
        routes: Routes,
        batches: Iterator[Batch],
        apart: set[str],
    ) -> BatchSums | None:
        """The sums over all batches; ``None``, and more ``apart``, if one shows them wrong."""
        by_position = self.positions == "independent"
        taken, factors = needed(routes, self.structure, self.factor_limit, by_position=by_position)
        total = BatchSums(
            passes,
            taken,
            factors,
            kind=self.kind,
            every=self.structure != "kronecker",
            draws=self.draws,
            stream=self.stream,
            by_position=by_position,
        )
        for batch in batches:
            if self.verify:
                check.examine(batch)
                if check.found_late:
                    check.found_late = False
                    return None
            if unbatched := total.add(batch):
                apart |= unbatched
                return None
            if self.most_terms is not None and total.terms >= self.most_terms:
                break
        return total

    def _routes_of(self, passes: Passes, first: Batch, couples: bool, apart: set[str]) -> Routes:
        if not self.verify:
            return unverified_routes(passes.calibration.space, apart)
        before = self.calibration
        if couples or apart or before is None or not _same_task(before, passes.calibration):
            two = examples_of(first, passes.losses.ignore_index, 2, self.mini_batch)
            return verified_routes(passes, two, couples=couples, apart=apart)
        return self._routes

    def _passes(
        self, calibration: Calibration, weights: Mapping[str, Tensor] | None, first: Batch
    ) -> Passes:
        ignored = calibration.ignore_index if self.ignore_index is None else self.ignore_index
        return Passes(
            calibration,
            weights,
            examples_of(first, ignored, MOST_EXAMPLES, self.mini_batch),
            average=self.token_loss == "mean",
            ignore_index=ignored,
            group=self.mini_batch,
        )


def _same_task(before: Calibration, now: Calibration) -> bool:
    """Whether two calibrations have model, parameters and loss in common."""
    same_model = before.model is now.model and before.pairs() == now.pairs()
    return same_model and before.loss_fn is now.loss_fn
