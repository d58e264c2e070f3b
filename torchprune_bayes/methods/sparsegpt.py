"""SparseGPT: layer by layer, one sweep over the columns of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchprune_bayes._checks import check_count, check_positive
from torchprune_bayes._numerics.cholesky import safe_cholesky
from torchprune_bayes._numerics.layer_update import damped, sweep
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes.methods._local import LayerLocalPruning, shares
from torchprune_bayes.methods.registry import register


@register("sparsegpt", title="layers by columns, with what is left", paper="arXiv:2301.00774")
class SparseGPT(LayerLocalPruning):
    """Prune every layer to the same sparsity, so that its outputs change little.

    `SparseGPT (Frantar and Alistarh, 2023) <https://arxiv.org/abs/2301.00774>`_: with the second
    moment ``G`` of a layer's inputs, damped, and the upper Cholesky factor ``U`` of ``G⁻¹``, the
    columns are processed once. The mask of a block of columns is chosen when the sweep reaches
    it, by the smallest ``w_j²/U_jj²``; pruned weights are compensated by later columns.
    Layers are pruned in the order of the model's calls.

    Args:
        amount: Fraction of the remaining entries to prune, or the number in each tensor; ``None``
            with a pattern.
        calibration: Data and model; the loss is not used.
        damping: Relative to the mean of ``diag G``, the paper's ``percdamp``.
        block_size: Columns whose mask is chosen at once.
        options: ``pattern``, ``ignore_padding`` and ``scope``, as of Wanda; ``scope="global"``
            shares the count out by ``w²/(G⁻¹)_jj`` of the dense weights.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is no calibration.
        CalibrationError: If the layers' inputs are not finite.

    Warns:
        CalibrationWarning: If no sample reaches a layer, which is then pruned by magnitude.

    Cost: one forward pass with the activations of all samples, and ``n³ + rows n²/2``
    multiplications for a layer with ``n`` inputs.

    Example:
        >>> from torchprune_bayes import Calibration, prune_global
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> data = [(torch.randn(32, 8), torch.randint(4, (32,)))]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(
        ...     None, "sparsegpt", amount=None, pattern="2:4", calibration=calibration
        ... )
        >>> decision.info["pruned"]
        {'0.weight': 64, '1.weight': 32}
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None,
        *,
        damping: float = 0.01,
        block_size: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(amount, **options)
        check_positive("damping", damping)
        check_count("block_size", block_size)
        self.damping, self.block_size = damping, block_size

    def scores(self, gram: Tensor, weights: Tensor) -> Tensor:
        """``w²/(G⁻¹)_jj``."""
        inverse = torch.cholesky_inverse(safe_cholesky(damped(gram, self.damping)))
        return wide(weights).square() / inverse.diagonal()

    def prune_rows(
        self, gram: Tensor, weights: Tensor, remaining: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """One sweep over the columns."""
        pattern = self.pattern
        if pattern is not None:
            group = pattern.size

            def best(columns: slice, values: Tensor, costs: Tensor) -> Tensor:
                return pattern.largest(costs, remaining[:, columns])

            block = -(-self.block_size // group) * group
            return sweep(damped(gram, self.damping), weights, best, group=group, block=block)
        starts = range(0, remaining.shape[1], self.block_size)
        blocks = [int(remaining[:, start : start + self.block_size].sum()) for start in starts]
        counts = dict(zip(starts, shares(count, blocks), strict=True))

        def smallest(columns: slice, values: Tensor, costs: Tensor) -> Tensor:
            return smallest_k([costs], counts[columns.start], [remaining[:, columns]])[0]

        matrix, size = damped(gram, self.damping), self.block_size
        return sweep(matrix, weights, smallest, group=size, block=size)
