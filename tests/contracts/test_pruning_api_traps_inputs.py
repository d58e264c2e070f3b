"""T22 to T25: masks, weights and tensors that ``torch.nn.utils.prune`` lets through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.contracts.cases import batches, calibration_of, mlp, pairs
from tests.contracts.state import unchanged
from torchprune_bayes import (
    Decision,
    Magnitude,
    WoodFisher,
    prune_global,
)
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    ParameterError,
)
from torchprune_bayes.methods import apply_decision
from torchprune_bayes.params import ParameterSpace


class Halving(prune.BasePruningMethod):
    """A foreign method with a mask that scales."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask * 0.5


def test_t22_masks_of_other_values_are_refused():
    """PyTorch multiplies by whatever it is given."""
    model = mlp()
    with unchanged(model), pytest.raises(ArgumentError, match="zeros and ones from Halving"):
        prune_global(pairs(model), Halving)
    prune.custom_from_mask(model[0], "weight", torch.full((5, 6), 0.5))
    with unchanged(model), pytest.raises(ParameterError, match="zeros and ones on"):
        prune_global(pairs(model), Magnitude, amount=0.5)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(5, 6), "torch.bool tensor of shape \\(5, 6\\)"),
        (torch.ones(6, 5).bool(), "got torch.bool of shape \\(6, 5\\)"),
        (torch.ones(5, 6).bool(), "got 15 revived"),
        (None, "got none"),
    ],
)
def test_t22_decisions_that_do_not_fit_are_refused(mask, error):
    """Masks only ever multiply, so an entry that is pruned cannot come back."""
    model = mlp()
    prune_global([pairs(model)[0]], Magnitude, amount=0.5)
    space = ParameterSpace(model, [pairs(model)[0]])
    with unchanged(model), pytest.raises(ArgumentError, match=error):
        apply_decision(space, Decision({} if mask is None else {"0.weight": mask}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [Magnitude, WoodFisher])
def test_t23_weights_that_are_not_finite_are_refused(method, value):
    """PyTorch never prunes NaN and says nothing."""
    model = mlp()
    options = {} if method is Magnitude else {"calibration": calibration_of(model)}
    with torch.no_grad():
        model[0].weight[1, 2] = value
    calls = (
        lambda: prune_global(pairs(model), method, amount=0.5, **options),
        lambda: prune.global_unstructured(pairs(model), method, amount=0.5, **options),
        lambda: method.apply(model[0], "weight", amount=0.5, **options),
    )
    for call in calls:
        with unchanged(model), pytest.raises(ArgumentError, match="got 1 NaN or infinite"):
            call()


def test_t24_prune_gives_a_pruned_copy():
    """PyTorch's ``method.prune(t)`` calls ``compute_mask`` with no module at all."""
    t = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    assert Magnitude(0.5).prune(t).tolist() == [[3.0, 0.0], [0.0, 2.0]]
    remaining = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert Magnitude(1).prune(t, remaining).tolist() == [[3.0, -1.0], [0.0, 0.0]]


def test_t24_prune_moves_the_copy_and_not_the_model():
    """A method that updates survivors must not do so behind the back of ``prune``."""
    model = mlp()
    method = WoodFisher(0.5, calibration=calibration_of(model), damping=0.01, update_scale=1.0)
    with unchanged(model):
        flat = method.prune(nn.utils.parameters_to_vector([m.weight for m, _ in pairs(model)]))
    prune_global(pairs(model), method=WoodFisher, **vars_of(method))
    expected = nn.utils.parameters_to_vector([m.weight for m, _ in pairs(model)])
    assert torch.equal(flat, expected)
    with pytest.raises(AlignmentError):
        WoodFisher(0.5, calibration=calibration_of(mlp())).prune(torch.zeros(3))


def vars_of(method: WoodFisher) -> dict[str, object]:
    names = ("amount", "calibration", "damping", "update_scale")
    return {name: getattr(method, name) for name in names}


def parametrized() -> tuple[nn.Module, str]:
    return parametrizations.weight_norm(nn.Linear(2, 2)), "weight"


@pytest.mark.parametrize(
    ("pair", "error"),
    [
        (
            (nn.Linear(2, 2, bias=False), "bias"),
            r"a parameter `params\[0\].bias`, got none",
        ),
        ((nn.Linear(2, 2), "wieght"), r"a parameter `params\[0\].wieght`, got none"),
        (parametrized(), "got the parametrized"),
        ((nn.BatchNorm1d(2), "running_mean"), "got none in BatchNorm1d"),
    ],
)
def test_t25_tensors_that_cannot_be_pruned_are_refused(pair, error):
    """PyTorch answers with errors from deep inside, or not at all."""
    module, name = pair
    with unchanged(module), pytest.raises(ParameterError, match=error):
        prune_global([pair], Magnitude, amount=0.5)
    with unchanged(module), pytest.raises(ParameterError, match=error):
        Magnitude.apply(module, name, amount=0.5)


@pytest.mark.parametrize("params", [[], None])
def test_t25_no_tensors_at_all_are_refused(params):
    """An empty list gives PyTorch's ``torch.cat`` something to complain about."""
    with pytest.raises((ParameterError, ArgumentTypeError), match="pair"):
        prune_global(params, Magnitude, amount=0.5)


def test_biases_can_be_pruned():
    model = mlp()
    prune_global([*pairs(model), (model[0], "bias")], Magnitude, amount=1.0)
    assert torch.equal(model(batches()[0][0]), torch.zeros(8, 3))
