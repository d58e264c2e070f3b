"""Folding the scale of gates into the weights around them and removing the gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprune_bayes.gates.attach import GATE_NAMES, detach_gate, gates_of
from torchprune_bayes.gates.scaling import scale_units


@torch.no_grad()
def fold_gates(model: nn.Module) -> dict[str, Tensor]:
    """Scale the weights by E[θ], zero where a gate is closed, and remove all gates.

    The output in evaluation mode is unchanged up to rounding, and nothing of the gates remains:
    no parameters, buffers, hooks or run-time cost. Optimizers that hold the gates' parameters
    keep them.

    Args:
        model: A model with gates.

    Returns:
        The masks of the units by site, ``True`` where the gate was open.

    Raises:
        ArgumentError: If there are no gates.

    Cost: one pass over the weights beside the gates.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> x = torch.ones(1, 4)
        >>> gates = attach_gates(model)
        >>> before = model(x)
        >>> fold_gates(model)
        {'2:in': tensor([True, True, True])}
        >>> torch.testing.assert_close(model(x), before)
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    gates = gates_of(model)
    masks = {}
    for name, gate in gates.items():
        site = gates.sites[name]
        module = model.get_submodule(site.module)
        scale_units(module, site.side, gate.scale())
        masks[name] = gate.mask.clone()
        detach_gate(module, GATE_NAMES[site.side])
    return masks
