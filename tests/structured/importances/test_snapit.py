"""SNAP-it: closed forms against explicit gates, conservation, schedule, shrinking, side effects."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.contracts.state import unchanged
from tests.references.node_sensitivity import (
    GatedAttention,
    GatedFlat,
    GatedResidual,
    explicit_gate_gradients,
)
from tests.structured.models import build, images, unsettled
from torchprune_bayes import Calibration
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    ParameterError,
)
from torchprune_bayes.structured import UnitGroup, UnitSlice, find_groups, shrink
from torchprune_bayes.structured.importances.snapit import SNAPitImportance, halving_path

GATES = ("consumer", "producer", "activation")


def made(model: nn.Module) -> nn.Module:
    return unsettled(model).double().eval()


def data(size: int, classes: int = 3, count: int = 9) -> tuple[Tensor, Tensor]:
    x = images(count, size).double()
    return x, torch.arange(count) % classes


def calibrated(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Calibration:
    return Calibration(model, list(zip(x.split(4), y.split(4), strict=True)), cross_entropy)


def cases() -> dict[str, tuple[nn.Module, Tensor, Tensor, list[UnitGroup]]]:
    found = {}
    for name, kind, size in (("residual", GatedResidual, 6), ("flat", GatedFlat, 5)):
        model = made(kind())
        x, y = data(size)
        found[name] = (model, x, y, find_groups(model, x[:1]))
    attention = GatedAttention()
    x = torch.randn(9, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found["heads"] = (made(attention), x, torch.arange(9) % 3, attention.groups())
    return found


CASES = cases()


def scores_of(
    model: nn.Module, calibration: Calibration, groups: list[UnitGroup], gate: str
) -> dict[str, Tensor]:
    importance = SNAPitImportance(calibration, gate=gate)
    importance.prepare(model, groups)
    scores = {group.name: importance.score(group, model) for group in groups}
    return {name: score for name, score in scores.items() if score is not None}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", CASES)
def test_closed_forms_are_the_gradients_of_explicit_gates(name, gate):
    model, x, y, groups = CASES[name]
    where = "made" if gate == "producer" else "read"
    units = {group.name: group.units for group in groups}
    expected, loss = explicit_gate_gradients(model, units, cross_entropy, x, y, where)
    scores = scores_of(model, calibrated(model, x, y), groups, gate)
    assert scores.keys() == expected.keys()
    for group, gradient in expected.items():
        assert float(gradient.abs().min()) > 0
        wanted = gradient.abs() / (loss + 1e-8)
        torch.testing.assert_close(scores[group].double(), wanted, rtol=1e-10, atol=1e-13)


def test_members_are_summed_with_their_signs():
    model, x, y, groups = CASES["residual"]
    (group,) = (group for group in groups if group.name == "stem")
    gradient = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    products = {
        name: parameter.detach() * found
        for (name, parameter), found in zip(model.named_parameters(), gradient, strict=True)
    }
    readers = torch.stack([products[f"{n}.weight"].sum((0, 2, 3)) for n in ("conv1", "conv3")])
    readers = torch.cat([readers, products["head.weight"].sum(0)[None]])
    assert bool(((readers > 0).any(0) & (readers < 0).any(0)).any()), "no cancellation to see"
    [score] = scores_of(model, calibrated(model, x, y), [group], "consumer").values()
    expected = readers.sum(0).abs() / (float(cross_entropy(model(x), y).detach()) + 1e-8)
    torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_norms_and_readers_agree_on_homogeneous_streams(name):
    # With ReLU, max or mean pooling and additions between them, scaling what the last norms give
    # and scaling what is read is the same.
    model = build(name).double()
    x, y = data(16, classes=5)
    gradient = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    products = {
        key: parameter.detach() * found
        for (key, parameter), found in zip(model.named_parameters(), gradient, strict=True)
    }
    loss = float(cross_entropy(model(x), y).detach()) + 1e-8
    groups = find_groups(model, x[:1])
    scores = scores_of(model, calibrated(model, x, y), groups, "consumer")
    checked = 0
    for group in groups:
        norms = [p for p in group.slices if p.role == "norm" and p.name in products]
        if norms:
            total = torch.stack([products[p.name][p.positions].sum(1) for p in norms]).sum(0)
            wanted = total.abs() / loss
            torch.testing.assert_close(scores[group.name], wanted, rtol=1e-10, atol=1e-13)
            checked += 1
    assert checked >= 1


def test_in_training_mode_the_scores_are_still_those_of_evaluation():
    # In training mode a batch norm makes the gradient of a gate before it vanish.
    model, x, y, groups = CASES["residual"]
    calibration = calibrated(model, x, y)
    expected = scores_of(model, calibration, groups, "producer")
    model.train()
    found = scores_of(model, calibration, groups, "producer")
    torch.manual_seed(0)
    state = copy.deepcopy(model.state_dict())
    vanished, _ = explicit_gate_gradients(model, {"conv1": 4}, cross_entropy, x, y, "made")
    model.load_state_dict(state)
    model.eval()
    torch.testing.assert_close(found, expected)
    assert float(vanished["conv1"].abs().max()) < 1e-4 * float(expected["conv1"].max())


@pytest.mark.parametrize("gate", ["consumer", "activation"])
def test_the_statistics_of_the_batch_are_those_of_training(gate):
    model = GatedResidual().double()  # before training: no batch norm has seen data
    x, y = data(6, count=8)
    groups = find_groups(model.eval(), x[:1])
    calibration = calibrated(model, x, y)  # two batches of four
    importance = SNAPitImportance(calibration, gate=gate, batch_norm="batch")
    twin = copy.deepcopy(model).train()
    units = {group.name: group.units for group in groups}
    parts = [
        explicit_gate_gradients(twin, units, cross_entropy, inputs, labels, "read")
        for inputs, labels in zip(x.split(4), y.split(4), strict=True)
    ]
    with unchanged(model):
        importance.prepare(model, groups)
    loss = (parts[0][1] + parts[1][1]) / 2 + 1e-8
    running = scores_of(model, calibration, groups, gate)
    for group in groups:
        wanted = ((parts[0][0][group.name] + parts[1][0][group.name]) / 2).abs() / loss
        score = importance.score(group, model)
        torch.testing.assert_close(score.double(), wanted, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(running[group.name].double(), wanted, rtol=0.1)


@pytest.mark.parametrize("gate", GATES)
def test_nothing_changes(gate):
    model, inputs = build("resnet"), images(8)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].train()
    model[3].conv1.weight.requires_grad_(False)
    groups = find_groups(model, inputs[:1])
    calibration = Calibration(model, [(inputs, torch.arange(8) % 5)], cross_entropy)
    with unchanged(model):
        scores = scores_of(model, calibration, groups, gate)
    assert len(scores) == len(groups)


def test_a_failure_leaves_no_hooks_and_nothing_frozen():
    model, inputs = build("resnet"), images(4)
    groups = find_groups(model, inputs[:1])
    bad = Calibration(model, [(inputs, torch.full((4,), 7))], cross_entropy)
    for gate in GATES:
        with unchanged(model), pytest.raises(IndexError):
            SNAPitImportance(bad, gate).prepare(model, groups)


def test_half_precision_is_scored_in_float32():
    model, inputs = build("vgg"), images(4)
    groups = find_groups(model, inputs[:1])
    half = copy.deepcopy(model).bfloat16()
    batch = [(inputs.bfloat16(), torch.arange(4))]
    expected = scores_of(half, Calibration(half, batch, cross_entropy), groups, "consumer")
    found = scores_of(half, Calibration(half, batch, cross_entropy), groups, "activation")
    for name, score in expected.items():
        torch.testing.assert_close(found[name].double(), score, rtol=1e-4, atol=1e-6)


def test_readers_of_hugging_face_have_their_inputs_first():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    tokens = torch.arange(12).reshape(2, 6) % 11
    calibration = Calibration(model, [{"input_ids": tokens, "labels": tokens}])
    groups = find_groups(model)
    consumer = scores_of(model, calibration, groups, "consumer")
    activation = scores_of(model, calibration, groups, "activation")
    assert {group.kind for group in groups} == {"head", "hidden"}
    for name, score in consumer.items():
        torch.testing.assert_close(activation[name].double(), score, rtol=1e-9, atol=1e-12)


def test_the_path_of_the_paper():
    expected = [0.5, 0.715, 0.8225, 0.87625, 0.903125, 0.9165625, 0.93]
    assert halving_path(0.93) == pytest.approx(expected, abs=1e-15)
    assert halving_path(0.98) == pytest.approx([0.5, 0.74, 0.86, 0.92, 0.95, 0.965, 0.98])
    assert halving_path(0.3) == [0.3]


@given(st.floats(0.01, 0.99), st.integers(0, 8))
def test_paths_rise_to_their_end_and_never_beyond(final, steps):
    path = halving_path(final, steps)
    assert path == sorted(path)
    assert path[-1] == final
    assert len(path) == (steps + 2 if final > 0.5 else 1)


@pytest.mark.parametrize("gate", GATES)
def test_shrinks_in_the_steps_of_the_paper_to_the_unit(gate):
    model, inputs = build("resnet"), images(12)
    calibration = Calibration(
        model, [(inputs, torch.arange(12) % 5)], cross_entropy, num_samples=12
    )
    total = sum(group.units for group in find_groups(model, inputs[:1]))
    report = shrink(
        model,
        inputs[:2],
        SNAPitImportance(calibration, gate=gate),
        sparsity=0.7,
        steps=halving_path(0.7),
        target="channels",
    )
    removed = [math.ceil(fraction * total - 1e-9) for fraction in halving_path(0.7)]
    assert report.steps == len(set(removed)), "a step that removes nothing is none"
    assert report.units.before - report.units.after == removed[-1]
    assert model(inputs).shape == (12, 5)


def test_every_step_takes_gradients_of_the_model_as_it_is_then():
    model, inputs = build("vgg"), images(12)
    calibration = Calibration(model, [(inputs, torch.arange(12) % 5)], cross_entropy)
    twin = copy.deepcopy(model)
    shrink(model, inputs[:2], SNAPitImportance(calibration), sparsity=0.6, steps=[0.3, 0.6])
    for fraction in (0.3, 0.6):  # of the whole: by hand, the second time on what is left
        fresh = Calibration(twin, [(inputs, torch.arange(12) % 5)], cross_entropy)
        whole = sum(p.numel() for p in build("vgg").parameters())
        left = sum(p.numel() for p in twin.parameters())
        share = 1 - (1 - fraction) * whole / left
        shrink(twin, inputs[:2], SNAPitImportance(fresh), sparsity=share)
    assert [p.shape for p in model.parameters()] == [p.shape for p in twin.parameters()]
    torch.testing.assert_close(model(inputs), twin(inputs))


@pytest.mark.parametrize("everywhere", [False, True])
def test_works_in_the_pruners_of_the_host(everywhere):
    tp = pytest.importorskip("torch_pruning")
    model, inputs = build("resnet"), images(8)
    calibration = Calibration(model, [(inputs, torch.arange(8) % 5)], cross_entropy)
    importance = SNAPitImportance(calibration)
    pruner = tp.pruner.BasePruner(
        model,
        (inputs[:1],),
        importance=importance,
        pruning_ratio=0.5,
        iterative_steps=2,
        global_pruning=everywhere,
    )
    pruner.step()
    pruner.step()
    assert importance._draws == 2, "one measurement for each step"
    assert model(inputs).shape == (8, 5), "the classifier keeps its outputs"
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(widths) < sum(
        m.out_channels for m in build("resnet").modules() if isinstance(m, nn.Conv2d)
    )


def test_in_the_torch_pruning_scores_follow_the_weights_and_are_taken_once_for_all_groups():
    tp = pytest.importorskip("torch_pruning")
    model, inputs = build("resnet"), images(8)
    calibration = Calibration(model, [(inputs, torch.arange(8) % 5)], cross_entropy)
    importance = SNAPitImportance(calibration)
    graph = tp.DependencyGraph().build_dependency(model, (inputs[:1],))
    first = [importance(group) for group in graph.get_all_groups()]
    assert importance._draws == 1
    again = [importance(group) for group in graph.get_all_groups()]
    assert importance._draws == 1
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    moved = [importance(group) for group in graph.get_all_groups()]
    assert importance._draws == 2
    assert any(score is not None for score in first)
    for a, b, c in zip(first, again, moved, strict=True):
        if a is not None:
            assert torch.equal(a, b)
            assert not torch.allclose(a, c)


def test_a_group_without_a_gate_is_left_whole():
    model, inputs = build("vgg"), images(4)
    calibration = Calibration(model, [(inputs, torch.arange(4))], cross_entropy)
    reads = UnitSlice("9.weight", 1, torch.arange(10)[:, None], "consumer")
    makes = UnitSlice("9.weight", 0, torch.arange(5)[:, None], "producer")
    silent = UnitGroup("7", "hidden", 10, (reads,))
    output = UnitGroup("9", "hidden", 5, (makes,))
    importance = SNAPitImportance(calibration, "producer")
    importance.prepare(model, [silent, output])
    assert importance.score(silent, model) is None
    assert importance.score(output, model) is None, "nothing reads the outputs of the model"
    assert importance._draws == 1


def test_bad_input():
    model, inputs = build("vgg"), images(4)
    calibration = Calibration(model, [(inputs, torch.arange(4))], cross_entropy)
    with pytest.raises(ArgumentError, match="gate"):
        SNAPitImportance(calibration, gate="input")
    with pytest.raises(ArgumentError, match="batch_norm"):
        SNAPitImportance(calibration, batch_norm="train")
    with pytest.raises(ArgumentError, match="gate='producer'"):
        SNAPitImportance(calibration, gate="producer", batch_norm="batch")
    with pytest.raises(ArgumentTypeError, match="Calibration"):
        SNAPitImportance(model)
    other = build("vgg", seed=1)
    with unchanged(other), pytest.raises(AlignmentError, match="model of the calibration"):
        shrink(other, inputs[:1], SNAPitImportance(calibration), sparsity=0.5)


def test_a_reader_that_is_not_called_is_an_error():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    calibration = Calibration(model, [(torch.randn(4, 4), torch.arange(4) % 3)], cross_entropy)
    reads = UnitSlice("idle.weight", 1, torch.arange(3)[:, None], "consumer")
    with pytest.raises(ParameterError, match="idle"):
        SNAPitImportance(calibration, "activation").prepare(
            model, [UnitGroup("used", "hidden", 3, (reads,))]
        )
