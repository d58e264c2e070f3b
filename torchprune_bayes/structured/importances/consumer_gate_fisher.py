"""Importance of units by the empirical Fisher of a gate on all their readers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchprune_bayes.calibration import Calibration
from torchprune_bayes.structured.groups import UnitGroup
from torchprune_bayes.structured.importances._calibrated import CalibratedImportance, gate_pieces
from torchprune_bayes.structured.importances._gates import Gates


class ConsumerGateFisherImportance(CalibratedImportance):
    """Predicted rise of the loss ``½ mean_n (Σ w·g_n)²`` when a unit is no longer read.

    Multiply every weight that reads unit ``u``, in all layers, by a gate ``c_u``, which is 1; at 0
    the unit is removed, whatever precedes it: norms, additions, attention, activations. With the
    weights ``w_u`` of these columns, the loss ``ℓ_n`` of sample ``n`` has the derivative
    ``∂ℓ_n/∂c_u = w_uᵀ g_n``, where ``g_n`` is its gradient by ``w_u``. To second order

        ``L(c_u = 0) - L(c_u = 1) ≈ -mean_n ∂ℓ_n/∂c_u + ½ ∂²L/∂c_u²``.

    At a trained network the mean derivative is near zero, and what there is of it is noise of the
    samples, so the first term is left out. For the negative log-likelihood the second derivative is
    approximated by the empirical Fisher of the gates, ``mean_n (∂ℓ_n/∂c_u)²``, which gives the
    score. Unlike the sum of the diagonal Fisher ``Σ_i w_i² mean_n g_ni²`` over the weights of a
    unit (Theis et al., 2018, https://arxiv.org/abs/1801.05787, take it for one weight or feature
    map), the square is taken after the sum over the unit: the weights of a unit are removed
    jointly, and their effects cancel or add up. Molchanov et al. (2019,
    https://arxiv.org/abs/1906.10771) square the same derivative, with gates behind batch norms
    only.

    Dimensions of queries and keys, which meet in a product, have their gates there: half of
    ``Σ w·g`` over what makes the queries and half over what makes the keys.

    Being an estimate of the loss for the whole unit, the scores of a head and a hidden unit can be
    compared, and divided by what the units cost.

    Args:
        calibration: Data, model and loss; one gradient for each mini-batch of it, so that
            ``mini_batch=1`` gives the formula.

    Raises:
        ArgumentTypeError: If there is no calibration.

    Cost: one forward and backward pass where the layers have rules
    (:attr:`~torchprune_bayes.Calibration.engine` is ``"layers"``), without forming gradients by
    weights; otherwise one pass of gradients of the reading layers' weights.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchprune_bayes.structured import find_groups
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     model[2].weight[:, 1] = 0.0
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> calibration = Calibration(model, data, nn.functional.cross_entropy)
        >>> [group] = find_groups(model, torch.zeros(1, 4))
        >>> ConsumerGateFisherImportance(calibration).score(group, model) > 0
        tensor([ True, False,  True])
    """

    joint = True

    def _measured(self, group: UnitGroup) -> bool:
        return bool(gate_pieces(group))

    def measure(self, calibration: Calibration, groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
        """The scores of all groups, in one pass of gradients."""
        gates = Gates(calibration, {group.name: gate_pieces(group) for group in groups})
        return {name: 0.5 * squares for name, squares in gates.mean_squares().items()}
