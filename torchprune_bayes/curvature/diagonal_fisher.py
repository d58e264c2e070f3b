"""The diagonal of the empirical Fisher: mean squared gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchprune_bayes._numerics.live_vector import LiveVector
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.curvature._sample_sums import SampleSums
from torchprune_bayes.types import Masks


class EmpiricalFisherDiagonal(SampleSums):
    """``F_ii = (1/N) Σ_n g_ni²`` of the live weights, from one streamed pass.

    The gradients ``g_n`` are those of the calibration: of single samples, or averaged over its
    mini-batches, which makes ``F`` smaller by about their size.

    Attributes:
        calibration: Where the gradients came from; ``None`` after ``load``.
        masks: Entries that were alive, by qualified name.
        count: ``N``.
        sums: ``Σ_n g_ni²``, float64, by qualified name, shaped like the tensors.

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> data = [(torch.eye(3), torch.zeros(3, 1))]
        >>> loss_fn = lambda output, target: output.mean()
        >>> EmpiricalFisherDiagonal().fit(Calibration(model, data, loss_fn)).diagonal()
        {'weight': tensor([[0.3333, 0.3333, 0.3333]], dtype=torch.float64)}
    """

    def fit(
        self,
        calibration: Calibration,
        weights: Mapping[str, Tensor] | None = None,
        masks: Masks | None = None,
    ) -> EmpiricalFisherDiagonal:
        """Sum squared gradients at ``weights`` of the entries that ``masks`` keep; returns itself.

        Args:
            calibration: Where gradients come from.
            weights: Values by qualified name; default the model's own.
            masks: Live entries; default those of the model.

        Raises:
            CalibrationError: If a gradient is not finite, or there are too few samples.

        Cost: one pass over the calibration data; ``8D`` bytes beside its gradient budget.
        """
        self.masks = calibration.space.masks() if masks is None else masks
        live = LiveVector(self.masks)
        total = torch.zeros(live.numel, dtype=torch.float64, device=calibration.device)
        for rows in calibration.gradients(weights, live):
            total += rows.square().sum(0, dtype=torch.float64)
        self.sums = live.scatter(total)
        self.count = calibration.num_gradients
        self.calibration = calibration
        return self

    def diagonal(self) -> dict[str, Tensor]:
        """``F_ii``, float64, by qualified name; zero where an entry was not alive."""
        return {name: total / self.count for name, total in self.sums.items()}
