from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from tests.training.gradual_cases import (
    MODES,
    OPTIMIZERS,
    Network,
    all_state,
    batch,
    pruned,
    run_of,
)
from torchprune_bayes import (
    WoodFisher,
)
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import Schedule, constant, cubic, linear, one_shot
from torchprune_bayes.training import GradualPruner


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    initial, final = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    begin = draw(st.integers(0, 4))
    make = draw(st.sampled_from([linear, cubic]))
    return make(final, begin, begin + draw(st.integers(0, 6)), draw(st.integers(1, 4)), initial)


@settings(max_examples=25, deadline=None)
@given(schedules(), st.sampled_from(MODES), st.sampled_from(["global", "layer"]))
def test_counts_are_exact_after_every_step(schedule: Schedule, mode: str, scope: str) -> None:
    model = Network()
    pruner = GradualPruner(model, "magnitude", schedule, mode=mode, scope=scope)
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        pruner.step()
        target = max((schedule(due) for due in schedule.steps() if due <= step), default=0.0)
        found = pruned(model.weights())
        if scope == "layer":
            assert found == {"first.weight": round(48 * target), "last.weight": round(24 * target)}
        assert sum(found.values()) == (
            round(72 * target) if scope == "global" else round(48 * target) + round(24 * target)
        )
    assert target == schedule.final
    assert pruner.finished
    assert pruner.sparsity == sum(found.values()) / 72


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("protect", [True, False])
def test_zeros_hold_for_ten_steps(mode: str, optimizer: str, protect: bool) -> None:
    run = run_of(schedule=one_shot(0.5, at=2), mode=mode, optimizer=optimizer, protect=protect)
    run.train(0, 2)
    masks = {name: value != 0 for name, value in run.model.weights().items()}
    for step in range(2, 12):
        run.train(step, step + 1)
        assert all(torch.equal(v != 0, masks[n]) for n, v in run.model.weights().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in run.pruner.masks.items())
    leaves = [tensor.leaf for tensor in ParameterSpace(run.model)]
    # Without the optimizer's help PyTorch's hidden leaf drifts, and moments do anyway.
    assert all(bool((leaf == 0).any()) for leaf in leaves) == (protect or mode == "zeros")
    moments = [v for p in leaves for v in run.optimizer.state[p].values() if v.shape == p.shape]
    assert all(bool((moment == 0).any()) for moment in moments) == protect


def test_both_modes_train_to_the_same_weights() -> None:
    runs = [run_of(WoodFisher, mode=mode, damping=0.01) for mode in MODES]
    for run in runs:
        run.train(0, 8)
    zeros, hooks = (run.model.weights() for run in runs)
    assert sum(pruned(zeros).values()) == 36
    for name, value in zeros.items():
        torch.testing.assert_close(value, hooks[name], rtol=0, atol=1e-6)
    assert runs[0].pruner.history[0].keys() == {"step", "sparsity", "pruned", "info"}
    assert [event["step"] for event in runs[0].pruner.history] == [2, 4]
    assert [event["pruned"] for event in runs[1].pruner.history] == [18, 18]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("saved_at", [1, 2, 5])
def test_resumed_training_is_the_uninterrupted_one(mode: str, saved_at: int) -> None:
    schedule = linear(0.6, begin=2, end=7, every=2, initial=0.2)
    options: dict[str, Any] = {"mode": mode, "damping": 0.01, "update_scale": 1.0}
    whole, first = (run_of(WoodFisher, schedule, **options) for _ in range(2))
    whole.train(0, 8)
    first.train(0, saved_at)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in (first.pruner, first.model, first.optimizer)], saved)
    saved.seek(0)
    states = torch.load(saved, weights_only=True)
    second = run_of(WoodFisher, schedule, seed=1, **options)
    parts: tuple[Any, ...] = (second.pruner, second.model, second.optimizer)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    second.train(saved_at, 8)
    assert len(whole.pruner.history) == 4
    assert second.pruner.history == whole.pruner.history
    assert all(map(torch.equal, all_state(second), all_state(whole)))


def test_zeros_mode_keeps_the_model_plain() -> None:
    run = run_of(schedule=one_shot(0.5, at=1))
    names = list(run.model.state_dict())
    run.train(0, 1)
    run.model(batch(0)[0]).sum().backward()
    assert list(run.model.state_dict()) == names
    AveragedModel(run.model).update_parameters(run.model)
    copies = [deepcopy(run.model), Network()]
    copies[1].load_state_dict(run.model.state_dict())
    assert all(pruned(copy.weights()) == pruned(run.model.weights()) for copy in copies)


def test_hooks_mode_leaves_what_the_host_leaves() -> None:
    run = run_of(schedule=one_shot(0.5, at=1), mode="hooks")
    run.train(0, 1)
    assert prune.is_pruned(run.model.first)
    masks = {f"{name}_mask": mask.float() for name, mask in run.pruner.masks.items()}
    assert all(torch.equal(dict(run.model.named_buffers())[n], m) for n, m in masks.items())


@pytest.mark.parametrize("schedule", [one_shot(0.5), constant(0.5), cubic(0.5, begin=0, end=0)])
def test_what_is_due_at_zero_is_done_at_the_first_step(schedule: Schedule) -> None:
    pruner = GradualPruner(Network(), "magnitude", schedule)
    assert not pruner.finished
    event = pruner.step()
    assert event == {"step": 1, "sparsity": 0.5, "pruned": 36, "info": [{}]}
    assert pruner.finished
    assert [pruner.step() for _ in range(3)] == [None, None, None]
    assert pruner.history == [event]
