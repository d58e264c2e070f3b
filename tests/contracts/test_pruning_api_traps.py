"""T1 to T9: what ``torch.nn.utils.prune`` shows a method, keeps of it, and leaves if it fails."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.contracts.cases import batches, calibration_of, live_count, masks_by_place, mlp, pairs
from tests.contracts.state import unchanged
from torchprune_bayes import (
    Calibration,
    Magnitude,
    WoodFisher,
    prune_global,
)
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
)
from torchprune_bayes.methods._target import Target

PLAIN = {"damping": 0.01, "update_scale": 1.0, "block_size": "full"}


def test_t1_wrong_order_is_refused():
    """A method sees a flat slice of values and nothing else."""
    model = mlp()
    options = {"pruning_method": WoodFisher, "amount": 0.5, "calibration": calibration_of(model)}
    with unchanged(model), pytest.raises(AlignmentError, match="keep the order"):
        prune.global_unstructured(pairs(model)[::-1], **options)


def test_t1_a_subset_is_refused():
    """A method sees a flat slice of values and nothing else."""
    model = mlp()
    options = {"pruning_method": WoodFisher, "amount": 0.5, "calibration": calibration_of(model)}
    with unchanged(model), pytest.raises(AlignmentError, match="Expected the 45 remaining entries"):
        prune.global_unstructured(pairs(model)[:1], **options)
    with unchanged(model), pytest.raises(AlignmentError, match="Expected the 2 parameters"):
        prune_global(pairs(model)[:1], WoodFisher, amount=0.5, calibration=calibration_of(model))


def test_t1_scores_are_refused():
    """PyTorch shows passed scores in the place of the weights."""
    model = mlp()
    calibration = calibration_of(model)
    scores = {pair: torch.rand_like(pair[0].weight) for pair in pairs(model)}
    with unchanged(model), pytest.raises(AlignmentError, match="pass no importance_scores"):
        prune.global_unstructured(
            pairs(model), WoodFisher, scores, amount=2, calibration=calibration
        )


@pytest.mark.parametrize("call", [prune.global_unstructured, prune_global])
def test_t1_a_missing_calibration_is_refused(call):
    """Without a calibration a method cannot know what it is shown."""
    model = mlp()
    with unchanged(model), pytest.raises(ArgumentTypeError, match="Expected `calibration="):
        call(pairs(model), WoodFisher, amount=0.5)
    with unchanged(model), pytest.raises(ArgumentTypeError, match="Expected `calibration="):
        WoodFisher.apply(model[0], "weight", amount=0.5)


def closed_form_joint_update(model: nn.Module, damping: float, pruned: Tensor) -> Tensor:
    """``w − F⁻¹[:, Q] (F⁻¹[Q, Q])⁻¹ w_Q`` with the Fisher of the model, gradient by gradient."""
    weights = [module.get_parameter("weight") for module, _ in pairs(model)]
    rows = []
    for x, y in batches(dtype=torch.float64):
        for sample, label in zip(x, y, strict=True):
            loss = cross_entropy(model(sample[None]), label[None])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    gradients = torch.stack(rows)
    w = torch.cat([weight.detach().flatten() for weight in weights])
    fisher = damping * torch.eye(len(w), dtype=w.dtype) + gradients.T @ gradients / len(rows)
    inverse = torch.linalg.inv(fisher)
    q = pruned.nonzero().squeeze(1)
    return w - inverse[:, q] @ torch.linalg.solve(inverse[q][:, q], w[q])


@pytest.mark.parametrize("call", [prune.global_unstructured, prune_global])
def test_t2_t3_updates_reach_the_same_parameters_though_the_host_has_no_place_for_them(call):
    """PyTorch never calls ``apply`` in its global route and knows no weight update."""
    model, dense = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    parameters = {id(parameter) for parameter in model.parameters()}
    calibration = calibration_of(model)
    call(pairs(model), WoodFisher, amount=0.5, calibration=calibration, update="joint", **PLAIN)
    pruned = ~torch.cat([mask.flatten() for mask in masks_by_place(model)])
    found = torch.cat([module.weight.detach().flatten() for module, _ in pairs(model)])
    expected = closed_form_joint_update(dense, 0.01, pruned)
    assert pruned.sum() == 22
    assert {id(parameter) for parameter in model.parameters()} == parameters
    torch.testing.assert_close(found, torch.where(pruned, 0.0, expected), rtol=1e-9, atol=1e-12)


def test_t3_apply_updates_one_tensor():
    """``apply`` is the other door, and only there the method becomes the hook."""
    model = mlp(dtype=torch.float64)
    alone = mlp(dtype=torch.float64)
    first = [pairs(alone)[0]]
    prune_global(first, WoodFisher, amount=0.5, calibration=calibration_of(alone, first), **PLAIN)
    calibration = calibration_of(model)
    hook = WoodFisher.apply(model[0], "weight", amount=0.5, calibration=calibration, **PLAIN)
    assert isinstance(hook, WoodFisher)
    torch.testing.assert_close(model[0].weight, alone[0].weight)
    assert not prune.is_pruned(model[2])


def prune_by_apply(model: nn.Module, calibration: Calibration) -> None:
    for module, name in pairs(model):
        WoodFisher.apply(module, name, amount=0.5, calibration=calibration)


def prune_by_host(model: nn.Module, calibration: Calibration) -> None:
    prune.global_unstructured(pairs(model), WoodFisher, amount=0.5, calibration=calibration)


def prune_by_us(model: nn.Module, calibration: Calibration) -> None:
    prune_global(pairs(model), WoodFisher, amount=0.5, calibration=calibration)


@pytest.mark.parametrize("call", [prune_by_apply, prune_by_host, prune_by_us])
def test_t4_hooks_hold_neither_model_nor_data(call):
    """PyTorch keeps the method on the module and pickles it."""

    class Data(list):
        """A list that can be referred to weakly."""

    model = mlp()
    data = Data((x, y) for x, y in batches())
    calibration = Calibration(model, data, cross_entropy, params=pairs(model))
    call(model, calibration)
    held = [weakref.ref(calibration), weakref.ref(data), weakref.ref(calibration.space)]
    reference = mlp()
    prune.global_unstructured(pairs(reference), prune.L1Unstructured, amount=0.5)
    assert len(pickle.dumps(model[0])) < len(pickle.dumps(reference[0])) + 400
    del calibration, data
    gc.collect()
    assert [reference() for reference in held] == [None, None, None]


def failing(*args: object, **kwargs: object) -> None:
    raise RuntimeError("interrupted")


@pytest.mark.parametrize("earlier", [1, 2, 3])
def test_t5_a_failing_further_apply_keeps_the_old_hook(earlier, monkeypatch):
    """PyTorch deletes the old hook, and fills its container, before it tries the new method."""
    model = mlp()
    for _ in range(earlier):
        Magnitude.apply(model[0], "weight", amount=0.2)
    calibration = calibration_of(model)
    with unchanged(model), pytest.raises(ArgumentError, match="Expected `amount` of at most"):
        WoodFisher.apply(model[0], "weight", amount=1000, calibration=calibration)
    with monkeypatch.context() as patch, unchanged(model):
        patch.setattr(WoodFisher, "compute_mask", failing)
        with pytest.raises(RuntimeError, match="interrupted"):
            WoodFisher.apply(model[0], "weight", amount=0.5, calibration=calibration)
    WoodFisher.apply(model[0], "weight", amount=0.5, calibration=calibration)
    assert prune.is_pruned(model[0])


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_t6_a_failure_in_the_middle_puts_everything_back(earlier, error, monkeypatch):
    """PyTorch's global call leaves a half-pruned model."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()
    for _ in range(earlier):
        prune_global([pairs(model)[0]], Magnitude, amount=0.2)
    calibration = calibration_of(model)
    original, calls = prune.custom_from_mask, []

    def breaks_at_the_last(module, name, mask):
        calls.append(module)
        if module is model[2]:
            raise error
        return original(module, name, mask)

    monkeypatch.setattr(prune, "custom_from_mask", breaks_at_the_last)
    with unchanged(model, optimizer), pytest.raises(error):
        prune_global(pairs(model), WoodFisher, amount=0.5, calibration=calibration)
    assert len(calls) == 2 - earlier


def test_t7_scores_are_refused_because_the_host_ignores_misnamed_ones():
    """PyTorch drops scores under a wrong key and takes transposed ones, without a word."""
    model = mlp()
    scores = torch.rand_like(model[0].weight)
    with unchanged(model), pytest.raises(ArgumentError, match="no importance_scores"):
        Magnitude.apply(model[0], "weight", amount=0.5, importance_scores=scores)
    with unchanged(model), pytest.raises(ArgumentError, match="no importance_scores"):
        Magnitude(0.5).prune(model[0].weight, importance_scores=scores)
    with unchanged(model), pytest.raises(TypeError, match="importance_scores"):
        prune_global(pairs(model), Magnitude, amount=0.5, importance_scores=scores)


def test_t8_signed_scores_are_ranked_with_their_sign():
    """PyTorch's L1 method takes the absolute value of scores: -1, 0 and 1 would go."""
    scores = {"w": torch.arange(-6.0, 6.0)}
    kept = Target({"w": torch.ones(12).bool()}, 3).keep(0, scores, {"w": torch.ones(12).bool()})
    assert scores["w"][~kept["w"]].tolist() == [-6.0, -5.0, -4.0]


def test_t9_parameters_may_come_from_a_generator():
    """PyTorch iterates over its parameters three times."""
    model = mlp()
    calibration = calibration_of(model, (pair for pair in pairs(model)))
    prune_global((pair for pair in pairs(model)), WoodFisher, amount=0.4, calibration=calibration)
    assert live_count(model) == 27
