from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.utils import prune

from tests.training.gradual_cases import (
    MODES,
    TWICE,
    Network,
    all_state,
    batch,
    calibration_for,
    pruned,
    run_of,
)
from torchprune_bayes import (
    Calibration,
    PruningMethod,
    WoodFisher,
    prunable_parameters,
    prune_global,
    registered_methods,
)
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
)
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import linear, one_shot
from torchprune_bayes.training import GradualPruner
from torchprune_bayes.types import Decision


@pytest.mark.parametrize("mode", MODES)
def test_tensors_may_have_schedules_of_their_own(mode: str) -> None:
    torch.manual_seed(0)
    model = Network()
    by_name = {"first.weight": one_shot(0.75, at=1), "last.weight": one_shot(0.25, at=2)}
    calibration = calibration_for(model)
    pruner = GradualPruner(
        None, WoodFisher, by_name, calibration=calibration, mode=mode, damping=0.01
    )
    pruner.step()
    assert pruned(model.weights()) == {"first.weight": 36, "last.weight": 0}
    assert not pruner.finished
    pruner.step()
    assert pruned(model.weights()) == {"first.weight": 36, "last.weight": 6}
    assert pruner.finished


def test_equal_schedules_are_one_group_and_pairs_name_tensors() -> None:
    model = Network()
    with torch.no_grad():
        model.first.weight *= 1e-6
    schedule = {(layer, "weight"): one_shot(0.5, at=1) for layer in (model.first, model.last)}
    pruner = GradualPruner(model, "magnitude", schedule)
    event = pruner.step()
    assert event is not None
    assert len(event["info"]) == 1
    assert pruned(model.weights()) == {"first.weight": 36, "last.weight": 0}


class Recording(PruningMethod):
    """Prunes the first remaining entries; keeps the calibrations it was given; fails on request."""

    seen: ClassVar[list[Calibration]] = []
    fails = False

    def decide(self, space: ParameterSpace) -> Decision:
        assert space.names == self.space.names
        self.seen.append(self.required_calibration)
        if self.fails:
            raise RuntimeError("no decision")
        assert isinstance(self.amount, int)
        masks, left = space.masks(), self.amount
        for mask in masks.values():
            gone = mask.flatten().nonzero()[:left]
            mask.view(-1)[gone] = False
            left -= len(gone)
        moved = {name: value + 1 for name, value in space.values().items()}
        return Decision(masks, moved, info={"left": left})


@pytest.mark.parametrize("mode", MODES)
def test_each_event_sees_the_moment_and_draws_anew(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "seen", [])
    run = run_of(Recording, linear(0.75, 1, 3), mode=mode)
    known = []
    for step in range(4):
        known.append(run.pruner.masks)
        run.train(step, step + 1)
    first, second = Recording.seen
    assert (first.seed, second.seed) == (5, first.redrawn(1).seed)
    for calibration, masks in zip(Recording.seen, known[1:3], strict=True):
        rows = torch.cat(list(calibration.gradients()))
        remaining = sum(int(mask.sum()) for mask in calibration.space.masks().values())
        assert rows.shape == (24, remaining)
        assert mode == "hooks" or all(
            torch.equal(mask, masks[name]) for name, mask in calibration.space.masks().items()
        )
    assert [event["info"] for event in run.pruner.history] == [[{"left": 0}], [{"left": 0}]]


@pytest.mark.parametrize("mode", MODES)
def test_failing_method_leaves_everything_as_it_was(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"first.weight": linear(0.75, 1, 3), "last.weight": linear(0.5, 1, 3)}
    run = run_of(Recording, both, mode=mode)
    run.train(0, 2)
    run.model(batch(0)[0]).sum().backward()
    before = [value.clone() for value in all_state(run)]
    gradients = {name: deepcopy(p.grad) for name, p in run.model.named_parameters()}
    state, names = run.pruner.state_dict(), list(run.model.state_dict())
    monkeypatch.setattr(Recording, "fails", True)
    with pytest.raises(RuntimeError, match="no decision"):
        run.pruner.step()
    assert names == list(run.model.state_dict())
    assert all(map(torch.equal, before, all_state(run)))
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0)
    assert run.pruner.state_dict()["step"] == state["step"] == 2
    assert run.pruner.state_dict()["history"] == state["history"]
    monkeypatch.setattr(Recording, "fails", False)
    assert run.pruner.step() is not None


def test_ruinous_decision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def ruin(self: Recording, space: ParameterSpace) -> Decision:
        values = {name: value * torch.nan for name, value in space.values().items()}
        return Decision(space.masks(), values)

    run = run_of(Recording, one_shot(0.5, at=1))
    before = [value.clone() for value in all_state(run)]
    monkeypatch.setattr(Recording, "decide", ruin)
    with pytest.raises(ArgumentError, match="finite"):
        run.pruner.step()
    assert all(map(torch.equal, before, all_state(run)))


def test_methods_of_the_host_work_too() -> None:
    models = [Network() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    methods: list[Any] = ["magnitude", prune.L1Unstructured]
    for model, method in zip(models, methods, strict=True):
        pruner = GradualPruner(prunable_parameters(model), method, TWICE)
        for _ in range(4):
            pruner.step()
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
    assert sum(pruned(models[0].weights()).values()) == 36


def test_gradients_under_masks_are_those_of_the_model_with_zeros() -> None:
    model = Network()
    masks = {name: torch.rand_like(value) < 0.5 for name, value in model.weights().items()}
    space = ParameterSpace(model).with_masks(masks)
    seen = torch.cat(list(calibration_for(model).with_space(space).gradients()))
    with torch.no_grad():
        for tensor in ParameterSpace(model):
            tensor.leaf.mul_(masks[tensor.name])
    dense = torch.cat(list(calibration_for(model).gradients()))
    remaining = torch.cat([mask.flatten() for mask in masks.values()])
    torch.testing.assert_close(seen, dense[:, remaining])


def test_subset_and_restriction_keep_the_masks() -> None:
    model = Network()
    masks = {"last.weight": torch.rand(3, 8) < 0.5}
    space = ParameterSpace(model).with_masks(masks)
    for part in (space.subset(["last.weight"]), space.restricted(model.last, "weight")):
        assert part.names == ["last.weight"]
        assert torch.equal(part.masks()["last.weight"], masks["last.weight"])
    with pytest.raises(AlignmentError, match="names of the tensors"):
        space.subset(["middle.weight"])
    with pytest.raises(AlignmentError, match="calibration's model"):
        calibration_for(model).with_space(ParameterSpace(Network()))


@pytest.mark.parametrize(
    "name", sorted(name for name, e in registered_methods().items() if not e.is_structured)
)
def test_every_method_sees_held_masks_as_it_sees_the_hosts(name: str) -> None:
    found = []
    for mode in MODES:
        torch.manual_seed(0)
        model = Network()
        needed = registered_methods()[name].needs_calibration
        pruner = GradualPruner(
            model,
            name,
            linear(0.5, 1, 2, initial=0.25),
            calibration=calibration_for(model) if needed else None,
            mode=mode,
        )
        for _ in range(2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            pruner.step()
        assert sum(pruned(model.weights()).values()) == 36
        found.append(pruner.masks)
    assert all(torch.equal(mask, found[1][tensor]) for tensor, mask in found[0].items())


def test_amounts_by_tensor_must_name_all_tensors() -> None:
    model = Network()
    with pytest.raises(ArgumentError, match=r"for first.weight, .*, got 0.weight"):
        prune_global(prunable_parameters(model), "magnitude", amount={"0.weight": 1}, scope="layer")
    with pytest.raises(ArgumentError, match="of at least 0, got -1"):
        prune_global(
            prunable_parameters(model), "magnitude", amount={"first.weight": -1}, scope="layer"
        )
