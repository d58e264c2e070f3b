"""T1 to T14: traps of ``torch.nn.utils.prune`` for whoever plugs a method in; one test each."""

from __future__ import annotations

import gc
import pickle
import weakref

import numpy as np
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
    bake,
    prune_global,
)
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    TorchPruneBayesError,
)
from torchprune_bayes.methods._target import Target
from torchprune_bayes.params import ParameterSpace

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
    with unchanged(model), pytest.raises(AlignmentError, match="Expected the 45 live entries"):
        prune.global_unstructured(pairs(model)[:1], **options)
    with unchanged(model), pytest.raises(AlignmentError, match="Expected the 2 parameters"):
        prune_global(pairs(model)[:1], WoodFisher, amount=0.5, calibration=calibration_of(model))


def test_t1_scores_are_refused():
    """The host shows passed scores in the place of the weights."""
    model = mlp()
    calibration = calibration_of(model)
    scores = {pair: torch.rand_like(pair[0].weight) for pair in pairs(model)}
    with unchanged(model), pytest.raises(AlignmentError, match="pass no importance_scores"):
        prune.global_unstructured(pairs(model), WoodFisher, scores, amount=2, calibration=calibration)


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
    weights = [module.weight for module, _ in pairs(model)]
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
    """The host never calls ``apply`` in its global route and knows no weight update."""
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
    """The host keeps the method on the module and pickles it."""

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
    """The host deletes the old hook, and fills its container, before it tries the new method."""
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
    """The host's global call leaves a half-pruned model."""
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
    """The host drops scores under a wrong key and takes transposed ones, without a word."""
    model = mlp()
    scores = torch.rand_like(model[0].weight)
    with unchanged(model), pytest.raises(ArgumentError, match="no importance_scores"):
        Magnitude.apply(model[0], "weight", amount=0.5, importance_scores=scores)
    with unchanged(model), pytest.raises(ArgumentError, match="no importance_scores"):
        Magnitude(0.5).prune(model[0].weight, importance_scores=scores)
    with unchanged(model), pytest.raises(TypeError, match="importance_scores"):
        prune_global(pairs(model), Magnitude, amount=0.5, importance_scores=scores)


def test_t8_signed_scores_are_ranked_with_their_sign():
    """The host's L1 method takes the absolute value of scores: -1, 0 and 1 would go."""
    scores = {"w": torch.arange(-6.0, 6.0)}
    kept = Target({"w": torch.ones(12).bool()}, 3).keep(0, scores, {"w": torch.ones(12).bool()})
    assert scores["w"][~kept["w"]].tolist() == [-6.0, -5.0, -4.0]


def test_t9_parameters_may_come_from_a_generator():
    """The host iterates over its parameters three times."""
    model = mlp()
    calibration = calibration_of(model, (pair for pair in pairs(model)))
    prune_global((pair for pair in pairs(model)), WoodFisher, amount=0.4, calibration=calibration)
    assert live_count(model) == 27


def convolutions() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))


def test_t10_channels_last_and_non_contiguous_weights():
    """``view(-1)`` inside the host refuses both."""
    model, reference = convolutions(), convolutions()
    model = model.to(memory_format=torch.channels_last)
    model[1].weight.data = model[1].weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    for amount in (0.5, 0.3):
        prune_global(pairs(model), Magnitude, amount=amount)
        prune.global_unstructured(pairs(reference), prune.L1Unstructured, amount=amount)
    assert all(map(torch.equal, masks_by_place(model), masks_by_place(reference)))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), reference(x))
    Magnitude.apply(model[0], "weight", amount=0.5)
    assert int(model[0].weight_mask.sum()) == round(int(reference[0].weight_mask.sum()) * 0.5)


@pytest.mark.parametrize(
    ("amount", "kept"),
    [(0.2, 36), (9, 36), (1, 44), (1.0, 0), (0, 45), (0.0, 45), (45, 0)]
    + [(np.float32(0.2), 36), (np.int64(9), 36)],
)
def test_t11_amount_is_the_hosts(amount, kept):
    """A float is a fraction of what is left, an int a count: ``1`` is one entry, ``1.0`` all."""
    model, other = mlp(), mlp()
    prune_global(pairs(model), Magnitude, amount=amount)
    prune.global_unstructured(pairs(other), prune.L1Unstructured, amount=amount)
    assert live_count(model) == live_count(other) == kept


@pytest.mark.parametrize(
    ("amount", "error"),
    [(46, ArgumentError), (-1, ArgumentError), (1.5, ArgumentError), (float("nan"), ArgumentError)]
    + [(True, ArgumentTypeError), ("0.5", ArgumentTypeError), (None, ArgumentTypeError)]
    + [(torch.tensor(0.5), ArgumentTypeError)],
)
def test_t11_impossible_amounts_are_refused(amount, error):
    """The host finds out about some of them late, or not at all."""
    model = mlp()
    with unchanged(model), pytest.raises(error, match="amount"):
        prune_global(pairs(model), Magnitude, amount=amount)


def test_t11_amounts_add_up_on_what_is_left():
    """0.2 of everything and then 0.2 of the rest are 0.36."""
    model = mlp()
    prune_global(pairs(model), Magnitude, amount=0.2)
    prune_global(pairs(model), Magnitude, amount=0.25)
    assert live_count(model) == 27


@pytest.mark.parametrize("method", [Magnitude, WoodFisher])
def test_t12_masked_originals_may_drift(method):
    """Momentum and weight decay move masked entries of ``weight_orig``."""
    model = mlp()
    options = {} if method is Magnitude else {"calibration": calibration_of(model), **PLAIN}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x, y = batches()[0]
    cross_entropy(model(x), y).backward()
    optimizer.step()
    prune_global(pairs(model), method, amount=0.5, **options)
    first = masks_by_place(model)
    with torch.no_grad():
        for (module, _), mask in zip(pairs(model), first, strict=True):
            module.weight_orig[~mask] = 100.0
    optimizer.step()  # no forward pass follows, so `weight` lags behind `weight_orig`
    space = ParameterSpace(model, pairs(model))
    assert max(float(value.abs().max()) for value in space.values().values()) < 10
    prune.global_unstructured(pairs(model), method, amount=0.5, **options)
    prune_global(pairs(model), method, amount=0.5, **options)
    second = masks_by_place(model)
    assert not any((new & ~old).any() for new, old in zip(second, first, strict=True))
    assert live_count(model) == 5  # 45 - 22 - 12 - 6


class Tied(nn.Module):
    """Logits over the vocabulary from the embedding's own weights, as language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def test_t13_bake_writes_the_zeros_through_ties_and_keeps_these():
    """The host's ``remove`` writes zeros into whatever shares the tensor."""
    model = Tied()
    shared = model.embedding.weight
    prune_global([(model.head, "weight")], Magnitude, amount=0.5)
    assert int((shared == 0).sum()) == 0
    bake(model)
    assert model.head.weight is model.embedding.weight is shared
    assert int((shared == 0).sum()) == 20
    assert not prune.is_pruned(model)


@pytest.mark.parametrize("method", [Magnitude, prune.RandomUnstructured])
def test_t14_a_tied_tensor_in_the_list_twice_counts_once(method):
    """The host counts it twice, and gives its places different masks."""
    model = Tied()
    twice = [(model.embedding, "weight"), (model.head, "weight")]
    for kept in (20, 10):
        decision = prune_global(twice, method, amount=0.5)
        assert sum(int(mask.sum()) for mask in decision.masks.values()) == kept
        assert int(model.head.weight_mask.sum()) == kept
        assert torch.equal(model.head.weight_mask, model.embedding.weight_mask)
    tokens = torch.arange(10)
    before = model(tokens)
    assert model.head.weight_orig is model.embedding.weight_orig
    bake(model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model(tokens), before)


def test_t14_a_calibration_refuses_it():
    """A method that looks at gradients is told about ties instead of guessing."""
    model = Tied()
    twice = [(model.embedding, "weight"), (model.head, "weight")]
    with pytest.raises(TorchPruneBayesError, match="tied weights are one tensor"):
        Calibration(model, [(torch.arange(4), torch.arange(4))], cross_entropy, params=twice)
    calibration = Calibration(
        model, [(torch.arange(4), torch.arange(4))], cross_entropy, params=twice[1:]
    )
    prune_global(twice, WoodFisher, amount=0.5, calibration=calibration)
    assert torch.equal(model.head.weight_mask, model.embedding.weight_mask)
