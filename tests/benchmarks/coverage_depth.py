"""Whether gates and every importance work on an architecture."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.architectures import Architecture, Inputs, seeded
from torchprune_bayes import Calibration
from torchprune_bayes.errors import TorchPruneBayesError
from torchprune_bayes.gates import Gates, attach_gates, fold_gates
from torchprune_bayes.structured import UnitGroup, find_groups, importances, shrink
from torchprune_bayes.structured._torch_pruning_importance import as_unit_importance
from torchprune_bayes.structured.importance import UnitImportance
from torchprune_bayes.structured.importances import BMRSImportance
from torchprune_bayes.wiring.forward import run, tensors_in
from torchprune_bayes.wiring.groups import Role

CLASSES = 3


class WrongError(Exception):
    """A check that failed."""


class Scored(nn.Module):
    """A model behind a few fixed random projections of its first output: logits of a class.

    Takes the first of the model's inputs; the others are those of the first sample, for all.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._first, *self._others = inputs
        self._inputs = {key: inputs[key][:1] for key in self._others}

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[samples, classes]``."""
        given = {key: value.expand(len(x), *value.shape[1:]) for key, value in self._inputs.items()}
        flat = tensors_in(run(self.model, {self._first: x, **given}))[0].reshape(len(x), -1)
        projection = torch.randn(flat.shape[1], CLASSES, generator=seeded(), dtype=torch.float32)
        scale = (flat.shape[1]) ** -0.5
        return flat @ (projection * scale).to(flat)


def examine_gates(case: Architecture, build: Callable[[], nn.Module]) -> str:
    """Attach gates, train a step, close some, fold, and cut out what is closed.

    Returns:
        How many gates there are, or why there are none.

    Raises:
        WrongError: If outputs change where they must not, or a gate gets no gradient.
    """
    model, inputs = in_double(build(), case.inputs(2))
    before = outputs(model, inputs)
    try:
        gates = attach_gates(model, "auto", inputs, preserve=True, noise="batch")
    except TorchPruneBayesError as error:
        return f"none: {short(error)}"
    _same(before, outputs(model, inputs), "gates that preserve the outputs change them")
    _train(model, inputs)
    without = [name for name, gate in gates.items() if gate.mu.grad is None]
    if len(without) == len(gates):
        raise WrongError("no gate gets a gradient")
    _close(gates, find_groups(case.build().eval(), case.inputs(2)))
    closed = outputs(model, inputs)
    importance = BMRSImportance(gates, None)
    units = gates.units
    fold_gates(model)
    _same(closed, outputs(model, inputs), "folding changes the outputs")
    report = shrink(model, inputs, importance, target="evidence", verify=False)
    if report.units.after == report.units.before:
        raise WrongError("no closed gate is cut out")
    _same(closed, outputs(model, inputs), "cutting closed gates out changes the outputs")
    return f"{units}"


def _close(gates: Gates, groups: Sequence[UnitGroup]) -> None:
    """Close a third of the gates: those of a third of the units, where a unit has several."""
    whole = {
        (piece.name, piece.role): piece.positions[1::3].reshape(-1)
        for group in groups
        for piece in group.slices
    }
    for name, gate in gates.items():
        site = gates.sites[name]
        closed = torch.arange(gate.units) % 3 == 1
        role: Role = "norm" if site.side == "out" else "consumer"
        owned = whole.get((f"{site.module}.weight", role))
        if owned is not None:
            closed = torch.zeros(gate.units, dtype=torch.bool)
            closed[owned // site.repeat] = True
        gate.close(closed)


def examine_importances(case: Architecture, build: Callable[[], nn.Module]) -> str:
    """Score all groups by every importance, this library's and two of torch-pruning's.

    Returns:
        How many importances scored, and which refused.

    Raises:
        WrongError: If scores are not one finite number per unit, or the model has changed.
    """
    inputs = case.inputs(8)
    first = next(iter(inputs.values()))
    if not isinstance(first, Tensor):
        return "none: inputs are no single tensor"
    model = Scored(build(), inputs).eval()
    groups = find_groups(model, first[:2])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    done, refused = 0, []
    try:
        made = _importances(model, first)
    except TorchPruneBayesError as error:
        return f"none: {short(error)}"
    for name, make in made.items():
        try:
            if not _score(make(), model, groups):
                refused.append(f"{name} scores no group")
                continue
        except TorchPruneBayesError as error:
            refused.append(f"{name} refuses: {short(error)}")
            continue
        done += 1
        if any(not torch.equal(state[key], value) for key, value in model.state_dict().items()):
            raise WrongError(f"{name} changes the model")
    return "; ".join([f"{done}", *refused])


def _importances(model: nn.Module, inputs: Tensor) -> Mapping[str, Callable[[], UnitImportance]]:
    import torch_pruning as tp

    labels = torch.randint(CLASSES, (len(inputs),), generator=seeded())
    calibration = Calibration(
        model, [(inputs, labels)], nn.functional.cross_entropy, memory_mb=2048
    )
    made: dict[str, Callable[[], UnitImportance]] = {}
    for name in importances.__all__:
        kind = getattr(importances, name)
        if (
            isinstance(kind, type)
            and issubclass(kind, UnitImportance)
            and kind is not BMRSImportance
        ):
            make: Callable[..., UnitImportance] = kind
            takes_data = "calibration" in inspect.signature(make).parameters
            made[name] = partial(make, calibration) if takes_data else make
    made["torch-pruning's MagnitudeImportance"] = lambda: as_unit_importance(
        tp.importance.MagnitudeImportance()
    )
    return made


def _score(importance: UnitImportance, model: nn.Module, groups: Any) -> int:
    """Score groups and return how many of them are not left whole."""
    importance.prepare(model, groups)
    result = 0
    for group in groups:
        scores = importance.score(group, model)
        if scores is None:
            continue
        result += 1
        if scores.shape != (group.units,) or not bool(scores.isfinite().all()):
            raise WrongError(f"{type(importance).__name__} has no score for every unit")
    return result


def in_double(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy in double precision with its inputs, or both as they are if it fails in it."""
    twin, given = copy.deepcopy(model).double(), {k: _double(v) for k, v in inputs.items()}
    try:
        outputs(twin, given)
    except RuntimeError:  # a part of it names single precision
        return copy.deepcopy(model), inputs
    return twin, given


def _double(value: object) -> object:
    if isinstance(value, list):
        return [_double(each) for each in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """What a model returns in evaluation mode."""
    torch.manual_seed(0)  # some draw masks
    with torch.no_grad():
        return [each.clone() for each in tensors_in(run(model.eval(), inputs))]


def distance(some: list[Tensor], others: list[Tensor]) -> float | None:
    """The largest difference, relative to the largest entry; ``None`` if there are no entries.

    Raises:
        WrongError: If shapes differ.
    """
    result: list[float] = []
    for one, other in zip(some, others, strict=True):
        if one.shape != other.shape:
            raise WrongError(
                f"outputs of shape {tuple(one.shape)} in place of {tuple(other.shape)}"
            )
        if one.numel():
            scale = float(other.abs().max()) or 1.0
            result.append(float((one - other).abs().max()) / scale)
    return max(result, default=None)


def _same(before: list[Tensor], after: list[Tensor], what: str) -> None:
    difference = distance(after, before)
    if difference is None:
        raise WrongError("there are no outputs to compare")
    if difference > 1e-5:
        raise WrongError(f"{what} by {difference:.1g}")


def _train(model: nn.Module, inputs: Any) -> None:
    twin = copy.deepcopy(model)
    try:  # some do not train on so few pixels
        run(twin.train(), inputs)
        model.train()
    except Exception:
        model.eval()
    result = [each for each in tensors_in(run(model, inputs)) if each.requires_grad]
    sum(each.float().square().mean() for each in result).backward()  # type: ignore[union-attr]


def short(error: Exception) -> str:
    """One line that fits into a table."""
    return " ".join(str(error).split())[:300].replace("|", "/")
