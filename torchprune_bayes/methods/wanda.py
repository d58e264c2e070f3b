"""Wanda: weights times the norm of what they are multiplied with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from torchprune_bayes._checks import check_choice
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes._numerics.selection import smallest_k
from torchprune_bayes.methods._local import LayerLocalPruning, shares
from torchprune_bayes.methods.registry import register


@register("wanda", title="smallest |w| ‖x‖ of each output", paper="arXiv:2306.11695")
class Wanda(LayerLocalPruning):
    """Prune the smallest ``|w_ij| ‖x_j‖₂``, the same share of every output of every layer.

    `Wanda (Sun et al., 2023) <https://arxiv.org/abs/2306.11695>`_: weights count by the norm of the
    input that they are multiplied with, and are compared with those of the same output. Layers are
    pruned in the order of the model's calls, so that inputs are those of the pruned model. The
    weights that are kept do not move.

    Args:
        amount: Fraction of the remaining entries to prune, or the number in each tensor; ``None``
            with a pattern.
        calibration: Data and model; the loss is not used.
        compare: ``"output"``, the paper's, or ``"layer"``, all weights of a layer jointly.
        options: ``pattern="N:M"`` keeps ``N`` of every ``M`` inputs of an output;
            ``ignore_padding`` says whether tokens that the ``attention_mask`` leaves out do not
            count; ``scope`` is ``"layer"``, as in the paper, or ``"global"``, which shares the
            count out by the dense scores.

    Raises:
        ArgumentError: If an option has an impossible value.
        ArgumentTypeError: If there is no calibration.
        CalibrationError: If the layers' inputs are not finite.

    Warns:
        CalibrationWarning: If no sample reaches a layer, which is then pruned by magnitude.

    Cost: one forward pass with the activations of all samples, and ``n²`` multiplications per token
    for a layer with ``n`` inputs.

    Example:
        >>> from torchprune_bayes import Calibration, prune_global
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[1.0, -1.0, 2.0]]))
        >>> data = [(torch.tensor([[9.0, 1.0, 1.0]]), torch.zeros(1, 1))]
        >>> calibration = Calibration(model, data, torch.nn.functional.mse_loss)
        >>> prune_global(None, "wanda", amount=0.34, calibration=calibration).masks["weight"]
        tensor([[ True, False,  True]])
    """

    always_moves = False

    def __init__(
        self,
        amount: float | int | Mapping[str, int] | None,
        *,
        compare: Literal["output", "layer"] = "output",
        **options: Any,
    ) -> None:
        super().__init__(amount, **options)
        check_choice("compare", compare, ("output", "layer"))
        self.compare = compare

    def scores(self, gram: Tensor, weights: Tensor) -> Tensor:
        """``|w| ‖x‖``."""
        return wide(weights).abs() * wide(gram).diagonal().clamp_min(0.0).sqrt()

    def prune_rows(
        self, gram: Tensor, weights: Tensor, remaining: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """The smallest scores of each output, or of all."""
        scores = self.scores(gram, weights)
        if self.pattern is not None:
            keep = self.pattern.largest_of_rows(scores, remaining)
        elif self.compare == "layer":
            keep = smallest_k([scores], count, [remaining])[0]
        else:
            # Ties go by index; pruned entries come first.
            order = scores.masked_fill(~remaining, -1.0).argsort(dim=1, stable=True)
            gone = (~remaining).sum(1) + torch.tensor(
                shares(count, remaining.sum(1).tolist()), device=remaining.device
            )
            keep = order.argsort(dim=1) >= gone.unsqueeze(1)
        return weights * keep, keep
