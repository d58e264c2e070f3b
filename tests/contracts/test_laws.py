"""Laws that hold for every registered method, those added later included."""

from __future__ import annotations

import importlib
import json
import pickle
import pkgutil
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

import torchprune_bayes.methods
from tests.contracts.cases import (
    CLASSES,
    batches,
    calibration_of,
    live_count,
    masks_by_place,
    mlp,
    options_of,
    pairs,
)
from tests.contracts.state import unchanged
from torchprune_bayes import Calibration, Decision, PruningMethod, prune_global, registered_methods
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.methods import find_method
from torchprune_bayes.params import ParameterSpace

METHODS = sorted(name for name, entry in registered_methods().items() if not entry.is_structured)
OURS = [name for name in METHODS if issubclass(find_method(name).method, PruningMethod)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EXPORTED = {getattr(torchprune_bayes.methods, key) for key in torchprune_bayes.methods.__all__}
INFRASTRUCTURE = {"base", "decisions", "global_pruning", "masks", "registry", "paper_variant"}
INFRASTRUCTURE |= {"module_state", "sensitivity", "stepwise"}


def method_of(name: str) -> type[prune.BasePruningMethod]:
    return find_method(name).method


def is_layerwise(name: str) -> bool:
    method = method_of(name)(0.5, **options_of(name, mlp()))  # type: ignore[call-arg]
    return getattr(method, "scope", "global") == "layer"


def expected_left(name: str, masks: list[Tensor], amount: float | int) -> int:
    groups = [int(mask.sum()) for mask in masks]
    groups = groups if is_layerwise(name) else [sum(groups)]
    return sum(n - (amount if isinstance(amount, int) else round(amount * n)) for n in groups)


def pruned(name: str, model: nn.Module, amount: float | int = 0.5, seed: int = 0) -> Decision:
    options = options_of(name, model)
    torch.manual_seed(seed)
    return prune_global(pairs(model), name, amount=amount, **options)


def pruned_by_host(name: str, model: nn.Module, amount: float | int = 0.5, seed: int = 0) -> None:
    options = options_of(name, model)
    torch.manual_seed(seed)
    prune.global_unstructured(pairs(model), method_of(name), amount=amount, **options)


def busy() -> nn.Sequential:
    """A model in the middle of its training: modes, buffers, gradients, an earlier pruning."""
    torch.manual_seed(4)
    hidden = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout())
    model = nn.Sequential(hidden, nn.Linear(5, CLASSES))
    hidden[1].eval()
    prune.random_unstructured(model[1], "weight", 0.2)
    x, y = batches()[0]
    cross_entropy(model(x), y).backward()
    return model


@pytest.mark.parametrize("name", METHODS)
def test_the_registry_says_what_the_class_says(name):
    entry = find_method(name)
    assert entry.method.PRUNING_TYPE == "unstructured"
    assert getattr(entry.method, "needs_calibration", False) == entry.needs_calibration
    assert name == name.lower() == entry.name
    assert entry.title
    assert entry.method.__doc__
    assert entry.method in EXPORTED


def test_every_public_module_registers_a_method():
    folder = torchprune_bayes.methods.__path__
    modules = [info.name for info in pkgutil.iter_modules(folder) if not info.name.startswith("_")]
    registered = [entry.method for entry in registered_methods().values()]
    for short in set(modules) - INFRASTRUCTURE:
        module = importlib.import_module(f"torchprune_bayes.methods.{short}")
        here = [method for method in registered if method.__module__ == module.__name__]
        hosts = [m for m in vars(module).values() if m in registered and _is_the_hosts(m)]
        assert here or hosts, f"methods/{short}.py registers no method"
        assert EXPORTED.issuperset(here), f"methods/__init__.py does not export {here}"


def _is_the_hosts(method: Any) -> bool:
    return method.__module__ == prune.__name__


@pytest.mark.parametrize("name", OURS)
def test_deciding_changes_nothing(name):
    model = busy()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    options = options_of(name, model)
    method = method_of(name)(0.5, **options)
    assert isinstance(method, PruningMethod)
    calibrated = "calibration" in options
    space = method.space if calibrated else ParameterSpace(model, pairs(model))
    with unchanged(model, optimizer):
        decision = method.decide(space)
    assert set(decision.masks) == {"0.0.weight", "1.weight"}


@pytest.mark.parametrize("name", OURS)
def test_applying_changes_weights_and_masks_alone(name):
    model = busy()
    parameters = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    options = options_of(name, model)
    before = torch.get_rng_state()
    prune_global(pairs(model), name, amount=0.5, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, parameters[id(parameter)])
    assert int(model[0][1].num_batches_tracked) == 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("amount", [0.0, 0.1, 0.9, 1.0, 1])
def test_exactly_as_many_go_as_asked(name, amount):
    model = mlp()
    if isinstance(amount, int) and is_layerwise(name):
        options = options_of(name, model)
        with unchanged(model), pytest.raises(ArgumentError, match="scope='layer'"):
            prune_global(pairs(model), name, amount=amount, **options)
        return
    expected = expected_left(name, masks_by_place(model), amount)
    pruned(name, model, amount)
    assert live_count(model) == expected


@pytest.mark.parametrize("name", METHODS)
def test_exactly_as_many_go_where_all_scores_tie(name):
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    pruned(name, model, 0.3)
    assert live_count(model) == expected_left(name, masks_by_place(mlp()), 0.3)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_pruned_stays_pruned(name):
    model = mlp()
    history = [masks_by_place(model)]
    for amount in (0.3, 0.3, 0.5):
        pruned(name, model, amount)
        history.append(masks_by_place(model))
        assert live_count(model) == expected_left(name, history[-2], amount)
    for earlier, later in pairwise(history):
        assert not any((new & ~old).any() for new, old in zip(later, earlier, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_model(name):
    first, second = mlp(), mlp()
    pruned(name, first)
    pruned(name, second)
    assert all(map(torch.equal, masks_by_place(first), masks_by_place(second)))
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_dtype_and_device_stay(name, dtype, device):
    model = mlp(dtype=dtype).to(device)
    decision = pruned(name, model)
    x, _ = batches(dtype=dtype)[0]
    assert model(x.to(device)).dtype == dtype
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
    assert live_count(model) == expected_left(name, masks_by_place(mlp()), 0.5)
    for mask, (module, _) in zip(decision.masks.values(), pairs(model), strict=True):
        assert mask.dtype == torch.bool
        assert mask.shape == module.weight.shape


@pytest.mark.parametrize("name", METHODS)
def test_the_hosts_call_gives_the_same_model(name):
    ours, hosts = mlp(), mlp()
    for amount in (0.4, 0.5):
        if is_layerwise(name) and not find_method(name).needs_calibration:
            with unchanged(hosts), pytest.raises(ArgumentError, match="shows a method no layers"):
                prune.global_unstructured(pairs(hosts), method_of(name), amount=amount)
            continue
        pruned(name, ours, amount)
        pruned_by_host(name, hosts, amount)
        assert all(map(torch.equal, masks_by_place(ours), masks_by_place(hosts)))
        for (our, _), (host, _) in zip(pairs(ours), pairs(hosts), strict=True):
            assert torch.equal(our.weight, host.weight)


@pytest.mark.parametrize("name", METHODS)
def test_apply_prunes_one_tensor(name):
    model = mlp()
    options = options_of(name, model)
    for left in (15, 7):  # of 30, and of 15 (Python rounds 7.5 to 8)
        hook = method_of(name).apply(model[0], "weight", amount=0.5, **options)
        assert list(model[0]._forward_pre_hooks.values()) == [hook]
        assert int(model[0].weight_mask.sum()) == left
    assert isinstance(hook, prune.PruningContainer)
    assert not prune.is_pruned(model[2])
    assert torch.equal(model[0].weight, model[0].weight_orig * model[0].weight_mask)


@pytest.mark.parametrize("name", METHODS)
def test_a_decision_tells_what_was_done(name):
    model, dense = mlp(), mlp()
    decision = pruned(name, model)
    json.dumps(decision.info, allow_nan=False)
    for part in (decision.updates, decision.scores):
        assert part is None or part.keys() == decision.masks.keys()
    for (module, _), (untouched, _), (key, mask) in zip(
        pairs(model), pairs(dense), decision.masks.items(), strict=True
    ):
        values = untouched.weight if decision.updates is None else decision.updates[key]
        assert torch.equal(module.weight[mask], values[mask])
        assert not module.weight[~mask].any()
        if decision.updates is None:
            assert torch.equal(module.weight_orig, untouched.weight)
        else:
            assert not values[~mask].any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("call", [pruned, pruned_by_host])
def test_what_is_left_is_the_hosts(name, call):
    model, reference = mlp(), mlp()
    if call is pruned_by_host and is_layerwise(name) and not find_method(name).needs_calibration:
        pytest.skip("PyTorch's call shows no layers")
    call(name, model)
    prune.global_unstructured(pairs(reference), prune.L1Unstructured, amount=0.5)
    assert set(model.state_dict()) == set(reference.state_dict())
    assert prune.is_pruned(model)
    x, _ = batches()[0]
    expected = model(x)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    for module, tensor_name in pairs(model):
        prune.remove(module, tensor_name)
    assert torch.equal(model(x), expected)
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert not prune.is_pruned(model)


@pytest.mark.parametrize("name", METHODS)
def test_the_hook_of_apply_holds_nothing(name):
    model, reference = mlp(), mlp()
    hook = method_of(name).apply(model[0], "weight", amount=0.5, **options_of(name, model))
    assert not [key for key, value in vars(hook).items() if isinstance(value, (Tensor, nn.Module))]
    prune.l1_unstructured(reference[0], "weight", amount=0.5)
    assert len(pickle.dumps(model)) < len(pickle.dumps(reference)) + 1000


UNCALIBRATED = [name for name in METHODS if not find_method(name).needs_calibration]
SHAPES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3)


@pytest.mark.parametrize("name", UNCALIBRATED)
@given(shapes=SHAPES, amounts=st.lists(st.floats(0, 1), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_counts_over_any_shapes(name, shapes, amounts):
    holders = [nn.Module() for _ in shapes]
    for holder, shape in zip(holders, shapes, strict=True):
        holder.weight = nn.Parameter(torch.randn(shape))
    places = [(holder, "weight") for holder in holders]
    left = [torch.ones(shape).bool() for shape in shapes]
    for amount in amounts:
        expected = expected_left(name, left, amount)
        left = list(prune_global(places, name, amount=amount).masks.values())
        assert sum(int(mask.sum()) for mask in left) == expected
        assert [mask.shape for mask in left] == [holder.weight.shape for holder in holders]


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(UNCALIBRATED)))
@given(sizes=st.tuples(st.integers(1, 5), st.integers(1, 4)), amount=st.floats(0, 1))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_counts_over_any_widths(name, sizes, amount):
    inputs, hidden = sizes
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))
    calibration = Calibration(model, batches(inputs=inputs), cross_entropy, num_samples=8)
    expected = expected_left(name, masks_by_place(model), amount)
    prune_global(None, name, amount=amount, calibration=calibration)
    assert live_count(model) == expected


def test_calibrations_serve_several_calls():
    model = mlp()
    calibration = calibration_of(model)
    for name in sorted(set(METHODS) - set(UNCALIBRATED)):
        prune_global(None, name, amount=0.1, calibration=calibration)
    assert live_count(model) < 45


@pytest.mark.parametrize("name", METHODS)
def test_frozen_weights_are_pruned_as_trainable_ones(name: str) -> None:
    trainable, frozen = mlp(), mlp().requires_grad_(False)
    expected, found = pruned(name, trainable), pruned(name, frozen)
    assert all(torch.equal(found.masks[key], mask) for key, mask in expected.masks.items())
    assert all(torch.equal(*two) for two in zip(trainable.buffers(), frozen.buffers(), strict=True))
    assert all(map(torch.equal, trainable.parameters(), frozen.parameters()))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
