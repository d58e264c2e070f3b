from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

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
    ArgumentTypeError,
    ParameterError,
)
from torchprune_bayes.params import ParameterSpace
from torchprune_bayes.schedules import Schedule, constant, cubic, linear, one_shot
from torchprune_bayes.training import GradualPruner
from torchprune_bayes.types import Decision

MODES = ["zeros", "hooks"]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}
TWICE = linear(0.5, begin=2, end=4, every=2, initial=0.25)


class Network(nn.Module):
    """72 weights: 48 in ``first`` and 24 in ``last``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def weights(self) -> dict[str, Tensor]:
        """The weights in use, pruned by the host or not."""
        return {name: value.detach() for name, value in ParameterSpace(self).values().items()}


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)


def calibration_for(model: nn.Module) -> Calibration:
    return Calibration(model, [batch(99, 48)], cross_entropy, num_samples=24, seed=5)


@dataclass
class Run:
    """A training that is the same whenever it starts from the same state."""

    model: Network
    optimizer: Optimizer
    pruner: GradualPruner

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            x, y = batch(step)
            self.optimizer.zero_grad()
            cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.pruner.step()


def run_of(
    method: Any = "magnitude",
    schedule: Any = TWICE,
    *,
    optimizer: str = "adamw",
    protect: bool = True,
    seed: int = 0,
    **options: Any,
) -> Run:
    torch.manual_seed(seed)
    model = Network()
    chosen = OPTIMIZERS[optimizer](model.parameters())
    if method not in ("magnitude", "layer-magnitude"):
        options["calibration"] = calibration_for(model)
    pruner = GradualPruner(
        model, method, schedule, optimizer=chosen if protect else None, **options
    )
    return Run(model, chosen, pruner)


def pruned(weights: dict[str, Tensor]) -> dict[str, int]:
    return {name: int((value == 0).sum()) for name, value in weights.items()}


def all_state(run: Run) -> list[Tensor]:
    moments = [
        value
        for entries in run.optimizer.state.values()
        for value in entries.values()
        if isinstance(value, Tensor)
    ]
    return [*run.model.state_dict().values(), *moments]


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
    # Without the optimizer's help the host's hidden leaf drifts, and moments do anyway.
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
    """Prunes the first live entries; keeps the calibrations it was given; fails on request."""

    seen: ClassVar[list[Calibration]] = []
    fails = False

    def decide(self, space: ParameterSpace) -> Decision:
        assert space is self.space
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
    assert (first.seed, second.seed) == (5, first.fresh(1).seed)
    for calibration, masks in zip(Recording.seen, known[1:3], strict=True):
        rows = torch.cat(list(calibration.gradients()))
        alive = sum(int(mask.sum()) for mask in calibration.space.masks().values())
        assert rows.shape == (24, alive)
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
    alive = torch.cat([mask.flatten() for mask in masks.values()])
    torch.testing.assert_close(seen, dense[:, alive])


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
    ("arguments", "error", "message"),
    [
        ({"amount": 0.5}, ArgumentError, "no `amount`, because the schedule gives it"),
        ({"curvature": None}, ArgumentError, "no `curvature`, because it is fitted anew"),
        ({"mode": "mask"}, ArgumentError, "one of 'zeros', 'hooks', got 'mask'"),
        ({"scope": "block"}, ArgumentError, "one of 'global', 'layer', got 'block'"),
        ({"params": None}, ArgumentTypeError, "`params` or `calibration=`, got neither"),
        ({"method": WoodFisher}, ArgumentTypeError, "for WoodFisher, got none"),
        ({"method": "none"}, ArgumentError, "got 'none'"),
        ({"method": prune.LnStructured}, ArgumentTypeError, "unstructured method"),
        ({"schedule": 0.5}, ArgumentTypeError, "Expected a Schedule .* got 0.5"),
        ({"schedule": {"first.weight": TWICE}}, ArgumentError, "difference in last.weight"),
        (
            {"schedule": {"first.weight": TWICE, "last.weight": TWICE, "x": TWICE}},
            ArgumentError,
            "difference in x",
        ),
        ({"params": nn.ReLU()}, ParameterError, "got none"),
    ],
)
def test_mistakes_show_at_once(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {"params": Network(), "method": "magnitude", "schedule": TWICE}
    with pytest.raises(error, match=message):
        GradualPruner(**good | arguments)


def test_tensors_of_others_are_refused() -> None:
    model, other = Network(), Network()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(AlignmentError, match="parameters of the optimizer"):
        GradualPruner(model, "magnitude", TWICE, optimizer=optimizer)
    with pytest.raises(AlignmentError, match="pass the same list to both"):
        GradualPruner(other, WoodFisher, TWICE, calibration=calibration_for(model))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"extra": 1}, ArgumentError, "Expected the keys history, masks and step"),
        ({"step": -1}, ArgumentError, "`step` of at least 0"),
        ({"masks": {"x": torch.ones(1)}}, AlignmentError, "got 'x'"),
        ({"masks": {"last.weight": torch.ones(1)}}, AlignmentError, r"\(3, 8\) for `last.weight`"),
    ],
)
def test_foreign_state_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    run = run_of(schedule=one_shot(0.5, at=1))
    run.train(0, 1)
    before = [value.clone() for value in all_state(run)]
    with pytest.raises(error, match=message):
        run.pruner.load_state_dict(run.pruner.state_dict() | change)
    assert all(map(torch.equal, before, all_state(run)))
    assert run.pruner.sparsity == 0.5


@pytest.mark.parametrize("name", sorted(registered_methods()))
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
    with pytest.raises(ArgumentError, match=r"for 0.weight, 1.weight, got first.weight"):
        prune_global(
            prunable_parameters(model), "magnitude", amount={"first.weight": 1}, scope="layer"
        )
    with pytest.raises(ArgumentError, match="of at least 0, got -1"):
        prune_global(
            prunable_parameters(model), "magnitude", amount={"0.weight": -1}, scope="layer"
        )
