"""FORCE: gradients at the pruned network, and weights that return."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.methods.sensitivity_cases import Data, calibration_on, chain, data_for
from tests.references.sensitivity import gate_gradients, ones_like, weights_of
from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.methods import FORCE, SNIPit


def literal_force(
    model: nn.Module, data: Data, amount: float, steps: int
) -> list[dict[str, Tensor]]:
    """Masks after every step: explicit gates at the last mask, ``|∂L/∂c|`` for all weights."""
    weights = weights_of(model)
    masks, found = ones_like(weights), []
    total = sum(weight.numel() for weight in weights.values())
    for step in range(1, steps + 1):
        gradients = gate_gradients(model, cross_entropy, data[0], data[1], weights, masks)
        flat = torch.cat([gradient.abs().flatten() for gradient in gradients.values()])
        keep = total - round(total * (1 - (1 - amount) ** (step / steps)))
        kept = torch.zeros_like(flat)
        kept[flat.topk(keep).indices] = 1
        pieces = kept.split([weight.numel() for weight in weights.values()])
        masks = {n: piece.view_as(weights[n]) for n, piece in zip(weights, pieces, strict=True)}
        found.append(masks)
    return found


def test_masks_are_those_of_explicit_gates():
    model, data = chain(8, 12, 3), data_for(20, 8, classes=3)
    history = literal_force(chain(8, 12, 3), data, amount=0.9, steps=6)
    decision = prune_global(
        None, FORCE, amount=0.9, calibration=calibration_on(model, data), steps=6
    )
    for name, mask in decision.masks.items():
        assert torch.equal(mask, history[-1][name].bool())
    revived = [
        int(sum(((new[name] == 1) & (old[name] == 0)).sum() for name in new))
        for old, new in pairwise(history)
    ]
    assert [step["revived"] for step in decision.info["steps"]] == [0, *revived]


def test_a_pruned_weight_returns_when_the_network_misses_it():
    # One output, three samples. Weights 0 and 1 share a sample that they fit almost together, so
    # both matter little and go first; without both, the error there is the largest of all.
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.1, 1.0, 1.0]]))
    x = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    target = torch.tensor([[2.2], [1.5], [1.4]])
    calibration = Calibration(model, [(x.double(), target.double())], mse_loss)
    decision = prune_global(None, FORCE, amount=0.75, calibration=calibration, steps=2)
    assert decision.info["steps"] == [
        {"kept": 2, "sparsity": 0.5, "revived": 0},
        {"kept": 1, "sparsity": 0.75, "revived": 1},
    ]
    assert decision.masks["weight"].tolist() == [[False, True, False, False]]
    # 2/3 |w · error|, of the dense weights, at the outputs (0, 1, 1) of the second mask
    expected = torch.tensor([[2.2, 2.42, 0.5, 0.4]]).double() * 2 / 3
    torch.testing.assert_close(decision.scores["weight"], expected, rtol=1e-6, atol=0)


def test_what_was_pruned_before_the_call_stays_so():
    model, data = chain(8, 12, 3), data_for(20, 8, classes=3)
    calibration = calibration_on(model, data)
    first = prune_global(None, FORCE, amount=0.5, calibration=calibration, steps=5)
    second = prune_global(None, FORCE, amount=0.8, calibration=calibration, steps=5)
    assert sum(int(mask.sum()) for mask in second.masks.values()) == 13
    assert not any((second.masks[name] & ~mask).any() for name, mask in first.masks.items())


def test_snip_it_never_revives():
    model, data = chain(8, 12, 3), data_for(20, 8, classes=3)
    decision = prune_global(None, SNIPit, amount=0.9, calibration=calibration_on(model, data))
    assert all(step["revived"] == 0 for step in decision.info["steps"])


def test_needs_data():
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, FORCE, amount=0.5)
