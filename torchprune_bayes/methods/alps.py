"""ALPS: layer by layer, masks and weights by operator splitting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchprune_bayes._checks import check_count, check_positive
from torchprune_bayes._numerics.layer_update import damped, descend_rows
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes._numerics.splitting import splitting_mask
from torchprune_bayes.methods._local import LayerLocalPruning
from torchprune_bayes.methods.registry import register


@register("alps", title="layers by operator splitting", paper="arXiv:2406.07831")
class ALPS(LayerLocalPruning):
    """Prune every layer to the same sparsity, with masks that are searched for.

    `ALPS (Meng et al., 2024) <https://arxiv.org/abs/2406.07831>`_: the mask with which a layer's
    outputs change the least is looked for by ADMM, whose penalty grows until the mask is settled;
    then the weights on it are solved for by conjugate gradients. Layers are pruned in the order of
    the model's calls.

    Args:
        amount: Fraction of the remaining entries to prune, or the number in each tensor; ``None``
            with a pattern.
        calibration: Data and model; the loss is not used.
        damping: Relative to the mean of ``diag G``.
        penalty: initial ``ρ`` of ADMM.
        iterations: Steps of ADMM at most.
        descent: Steps of conjugate gradients.
        options: ``pattern``, ``ignore_padding`` and ``scope``, as of Wanda; ``scope="global"``
            shares the count out by ``w² G_jj`` of the dense weights.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is no calibration.
        CalibrationError: If the layers' inputs are not finite.

    Warns:
        CalibrationWarning: If no sample reaches a layer, which is then pruned by magnitude.

    Cost: one forward pass with the activations of all samples; for a layer with ``n`` inputs its
    eigenvalues, ``10 n³``, and for every step ``rows n² + n³/3`` multiplications.

    Example:
        >>> import torch
        >>> from torchprune_bayes import Calibration, prune_global
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        >>> data = [(torch.randn(32, 8), torch.randint(4, (32,)))]
        >>> calibration = Calibration(model, data, torch.nn.functional.cross_entropy)
        >>> decision = prune_global(None, "alps", amount=0.5, calibration=calibration)
        >>> decision.info["pruned"]
        {'0.weight': 64, '1.weight': 32}
    """

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None,
        *,
        damping: float = 0.01,
        penalty: float = 0.1,
        iterations: int = 300,
        descent: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(amount, **options)
        check_positive("damping", damping)
        check_positive("penalty", penalty)
        check_count("iterations", iterations)
        check_count("descent", descent)
        self.damping, self.penalty = damping, penalty
        self.iterations, self.descent = iterations, descent

    def scores(self, gram: Tensor, weights: Tensor) -> Tensor:
        """``w² G_jj``."""
        return wide(weights).square() * damped(gram, self.damping).diagonal()

    def prune_rows(
        self, gram: Tensor, weights: Tensor, remaining: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Operator splitting for the mask, then conjugate gradients on it."""

        def project(values: Tensor) -> Tensor:
            squares = values.square()
            if self.pattern is None:
                return smallest_k([squares], count, [remaining])[0]
            return self.pattern.largest_of_rows(squares, remaining)

        matrix = damped(gram, self.damping)
        keep, start = splitting_mask(
            matrix, weights, project, penalty=self.penalty, steps=self.iterations
        )
        return descend_rows(matrix, weights, keep, self.descent, start=start), keep
