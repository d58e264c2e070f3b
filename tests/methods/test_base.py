"""What every method inherits: checks of arguments and the entry points of PyTorch's API."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.contracts.cases import calibration_of, masks_by_place, mlp, pairs
from tests.contracts.state import unchanged
from torchprune_bayes import Decision, Magnitude, PruningMethod, prune_global
from torchprune_bayes.errors import AlignmentError, ArgumentError, ArgumentTypeError
from torchprune_bayes.methods import LayerMagnitude
from torchprune_bayes.methods._target import Target
from torchprune_bayes.params import ParameterSpace


class Doubling(PruningMethod):
    """Prunes the smallest weights and doubles the others."""

    def decide(self, space: ParameterSpace) -> Decision:
        values, masks = space.values(), space.masks()
        scores = {name: value.abs() for name, value in values.items()}
        kept = Target(masks, self.amount, scope=self.scope).keep(0, scores, masks)
        updates = {name: 2 * value * kept[name] for name, value in values.items()}
        return Decision(kept, updates, scores)


class Reviving(PruningMethod):
    """A method with a mistake: it forgets what is pruned already."""

    def decide(self, space: ParameterSpace) -> Decision:
        masks = {name: torch.ones_like(mask) for name, mask in space.masks().items()}
        return Decision(masks, {name: value + 1 for name, value in space.values().items()})


def test_decide_must_be_written():
    with pytest.raises(TypeError, match="decide"):
        PruningMethod(0.5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"amount": 1.5}, ArgumentError),
        ({"amount": "half"}, ArgumentTypeError),
        ({"amount": 0.5, "scope": "tensor"}, ArgumentError),
        ({"amount": 3, "scope": "layer"}, ArgumentError),
        ({"amount": np.int64(3), "scope": "layer"}, ArgumentError),
        ({"amount": {"0.weight": 3}}, ArgumentTypeError),
        ({"amount": {"0.weight": -3}, "scope": "layer"}, ArgumentError),
        ({"amount": {"0.weight": 0.5}, "scope": "layer"}, ArgumentTypeError),
    ],
)
def test_impossible_arguments_are_refused(options, error):
    with pytest.raises(error, match="Expected"):
        Doubling(**options)


def test_a_missing_calibration_is_named_with_the_method():
    with pytest.raises(ArgumentTypeError, match="for Doubling, got none"):
        Doubling(0.5).space  # noqa: B018
    with pytest.raises(ArgumentTypeError, match="for Doubling, got none"):
        Doubling(0.5).compute_mask(torch.ones(3), torch.ones(3))


def test_the_mask_has_the_dtype_and_shape_of_the_default_mask():
    t = torch.tensor([[3.0, 1.0], [2.0, 9.0]])
    default = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16)
    mask = Magnitude(1).compute_mask(t, default)
    assert mask.dtype == torch.bfloat16
    assert mask.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert default.tolist() == [[1.0, 1.0], [1.0, 0.0]]


def test_the_hosts_call_writes_updates_and_lets_go():
    model, dense = mlp(), mlp()
    method = Doubling(0.5, calibration=calibration_of(model))
    flat = nn.utils.parameters_to_vector([module.weight for module, _ in pairs(model)])
    mask = method.compute_mask(flat, torch.ones_like(flat))
    assert method.calibration is None
    assert int(mask.sum()) == 23
    found = nn.utils.parameters_to_vector([module.weight for module, _ in pairs(model)])
    expected = nn.utils.parameters_to_vector([module.weight for module, _ in pairs(dense)])
    assert torch.equal(found, 2 * expected * mask)


def test_a_scope_of_layers_reaches_the_hosts_call_through_the_calibration():
    model = mlp()
    options = {"scope": "layer", "calibration": calibration_of(model)}
    prune.global_unstructured(pairs(model), Doubling, amount=0.4, **options)
    assert [int(mask.sum()) for mask in masks_by_place(model)] == [18, 9]


def test_a_scope_of_layers_takes_counts_by_name():
    model = mlp()
    options = {"scope": "layer", "calibration": calibration_of(model)}
    prune_global(pairs(model), Doubling, amount={"2.weight": 5, "0.weight": 10}, **options)
    assert [int(mask.sum()) for mask in masks_by_place(model)] == [20, 10]
    with unchanged(model), pytest.raises(ArgumentError, match=r"for 0.weight, 2.weight, got x"):
        prune_global(pairs(model), Doubling, amount={"x": 5}, **options)


def test_without_a_calibration_the_hosts_call_shows_no_layers():
    model = mlp()
    with unchanged(model), pytest.raises(ArgumentError, match="shows a method no layers"):
        prune.global_unstructured(pairs(model), LayerMagnitude, amount=0.4)


def test_apply_takes_arguments_by_position():
    model = mlp()
    hook = Magnitude.apply(model[0], "weight", 6)
    assert isinstance(hook, Magnitude)
    assert int(model[0].weight_mask.sum()) == 24
    assert list(model[0]._parameters) == ["weight_orig", "bias"]


def test_apply_refuses_a_tensor_that_is_not_the_calibrations():
    model = mlp()
    calibration = calibration_of(model, [pairs(model)[0]])
    with unchanged(model), pytest.raises(AlignmentError, match="that is not one of them"):
        Doubling.apply(model[2], "weight", amount=0.5, calibration=calibration)


@pytest.mark.parametrize("earlier", [0, 1])
def test_apply_puts_updated_values_back_if_it_fails(earlier, monkeypatch):
    model = mlp()
    for _ in range(earlier):
        prune.l1_unstructured(model[0], "weight", 0.2)
    calibration = calibration_of(model)

    def failing(module: nn.Module, hook: object) -> None:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch, unchanged(model):
        patch.setattr(nn.Module, "register_forward_pre_hook", failing)
        # PyTorch's own way back stumbles over what it did itself, with a KeyError.
        with pytest.raises((RuntimeError, KeyError)):
            Doubling.apply(model[0], "weight", amount=0.5, calibration=calibration)


def test_mistaken_methods_are_stopped_at_every_door():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.2)
    calibration = calibration_of(model)
    with unchanged(model), pytest.raises(ArgumentError, match="got 6 revived"):
        Reviving.apply(model[0], "weight", amount=0.5, calibration=calibration)
    with unchanged(model), pytest.raises(ArgumentError, match="got 6 revived"):
        prune.global_unstructured(pairs(model), Reviving, amount=0.5, calibration=calibration)


def test_prune_returns_updated_survivors():
    model = mlp()
    calibration = calibration_of(model, [pairs(model)[0]])
    method = Doubling(0.5, calibration=calibration)
    weight = model[0].weight
    with unchanged(model):
        found = method.prune(weight)
        assert torch.equal(found, method.prune(weight))  # nothing was let go
    assert int((found != 0).sum()) == 15
    assert torch.equal(found, torch.where(found != 0, 2 * weight, 0.0))


def test_prune_is_differentiable_where_no_weights_move():
    t = torch.tensor([3.0, -1.0, 2.0], requires_grad=True)
    Magnitude(1).prune(t).sum().backward()
    assert t.grad is not None
    assert t.grad.tolist() == [1.0, 0.0, 1.0]
