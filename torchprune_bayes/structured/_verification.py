"""Whether a shrunk model computes what the whole one computes with the same units zeroed.

In plain words: the question is put to a copy of the model in single precision, or double where that
does not decide, with weights moved a little, so that neither coarse numbers nor scales that start
at zero hide a wrong wiring. It is put twice, with other inputs and weights the second time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchprune_bayes._numerics.precision import has_float64
from torchprune_bayes.errors import ArgumentError, NumericalError, ParameterError
from torchprune_bayes.structured._replacement import replacement
from torchprune_bayes.structured.slicing import (
    ShrinkPlan,
    apply_plan,
    first_names,
    plan_of,
)
from torchprune_bayes.wiring._forward import ForwardFunction, at_rest, run, tensors_in
from torchprune_bayes.wiring.groups import UnitGroup

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6}
"""Largest difference that can be rounding, relative to the largest output.

Right plans differ by 1e-8 to 1e-6 in single precision. Models that compute a part in single
precision whatever their type keep double precision from telling more.
"""


_CHANGED = "without some of its units the others change"


class Twin:
    """A copy of a model that can be cut, compared with itself, and put back.

    Args:
        model: The model, without wrappers.
        example_inputs: What it is called with.
        forward_fn: How to call it otherwise.
        dtype: Floating point type of the copy.
        seed: Decides how its weights are moved; from seed 1 on its inputs are other ones too.

    Raises:
        ParameterError: If the model cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: ForwardFunction | None,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        place = _place(model, dtype)
        self.model = _copied(model).to(place, dtype)
        self.dtype = dtype
        generator = torch.Generator().manual_seed(seed)
        _move(self.model, generator)
        self._inputs = tree_map(
            lambda leaf: _input(leaf, dtype, place, seed, generator), example_inputs
        )
        self._forward_fn = forward_fn
        self.place = ""

    def difference(self, plan: ShrinkPlan) -> tuple[float, int]:
        """Compare the copy after a cut with itself before it, with zeros in place of what goes.

        Returns:
            The largest difference, relative to the largest output, and how many entries were
            compared. Where something is wrong, ``place`` names the innermost module that did not
            run, or the first whose output differs.

        Raises:
            ParameterError: If the cut copy does not run.
            NumericalError: If outputs have other shapes or are not finite at other places.
        """
        change = apply_plan(self.model, plan)
        try:
            shrunk, inner_shrunk = self._outputs()
        except Exception as error:
            raise ParameterError(
                "Expected the shrunk model to run on the example inputs, got "
                f"{_first_line(error)}: its wiring is not understood, and the model is left as it "
                "was."
            ) from error
        finally:
            change.undo()
        _, tensors = first_names(self.model)
        padded = {name: plan.expand(name, plan.cut(name, tensors[name])) for name in plan.kept}
        change = replacement(self.model, padded, lambda name, gradient: gradient, {})
        try:
            masked, inner = self._outputs()
        finally:
            change.undo()
        found = _compare(masked, shrunk)
        if not found[1]:
            found = _compare_inner(inner, inner_shrunk)
        if found[0] > TOLERANCES[self.dtype]:
            self.place = _first_other(inner, inner_shrunk, TOLERANCES[self.dtype])
        return found

    def _outputs(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        inner: dict[str, list[Tensor]] = {}
        running = [""]
        try:
            with at_rest(self.model), _watched(self.model, inner, running):
                return tensors_in(run(self.model, self._inputs, self._forward_fn)), inner
        finally:
            self.place = running[-1]


def check_equal(
    model: nn.Module,
    plan: ShrinkPlan,
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
) -> float:
    """Return the largest difference, relative to the largest output, that a cut makes.

    Args:
        model: The model before the cut, without wrappers; it is copied.
        plan: What stays.
        example_inputs: What the model is called with.
        forward_fn: How to call it otherwise.

    Raises:
        ArgumentError: If there is nothing to compare, as with empty or NaN outputs.
        ParameterError: If the model cannot be copied or the shrunk one does not run.
        NumericalError: If rounding cannot explain the difference.

    Cost: a copy of the model and four forward passes.
    """
    largest = 0.0
    for seed in (0, 1):
        found = _relative(model, plan, example_inputs, forward_fn, seed)
        if found is not None:
            largest = max(largest, found)
        elif seed == 0:
            raise ArgumentError(
                "Expected outputs to compare, got none that are finite: give example inputs on "
                "which the model computes something, or pass `verify=False`."
            )
    return largest


def _relative(
    model: nn.Module,
    plan: ShrinkPlan,
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
    seed: int,
) -> float | None:
    """The difference in the coarsest type that decides; ``None`` if nothing can be compared."""
    found = 0.0
    for dtype in dtypes_for(model):
        twin = Twin(model, example_inputs, forward_fn, dtype, seed)
        found, compared = twin.difference(plan)
        if not compared:
            return None
        if found <= TOLERANCES[dtype]:
            return found
    raise NumericalError(
        "Expected the shrunk model to compute what the whole one computes with the same units "
        f"zeroed, got a difference of {found:.3g} of the largest output where at most "
        f"{TOLERANCES[dtype]:.3g} can be rounding: its wiring is not understood, and the model is "
        "left as it was."
    )


def dtypes_for(model: nn.Module) -> list[torch.dtype]:
    """Return the types to compare in, the cheaper one first."""
    kinds = {tensor.dtype for tensor in model.parameters()}
    return [torch.float64] if torch.float64 in kinds else [torch.float32, torch.float64]


def failing_groups(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    example_inputs: Any,
    forward_fn: ForwardFunction | None,
) -> dict[str, str]:
    """Cut some units out of every group of a copy and tell which groups that breaks, and how.

    All groups are tried at once; only if that fails are they told apart by halving.

    Args:
        model: The model, without wrappers; it is copied.
        groups: Its groups.
        example_inputs: What the model is called with.
        forward_fn: How to call it otherwise.

    Returns:
        A sentence for each group that cannot be cut.

    Raises:
        ParameterError: If the model cannot be copied.

    Cost: a copy of the model and two forward passes; a few more for every group that fails.
    """
    reasons: dict[str, str] = {}
    changed: dict[str, str] = {}
    suspects = list(groups)
    if not suspects:
        return {}
    for dtype in dtypes_for(model):
        twin = Twin(model, example_inputs, forward_fn, dtype, seed=1)
        found = _failing(twin, suspects)
        # Rounding is no reason for a model not to run.
        reasons |= {name: why for name, why in found.items() if not why.startswith(_CHANGED)}
        changed = {name: why for name, why in found.items() if why.startswith(_CHANGED)}
        suspects = [group for group in suspects if group.name in changed]
        if not suspects:
            return reasons
    return reasons | changed


def _failing(twin: Twin, groups: Sequence[UnitGroup]) -> dict[str, str]:
    """Take out the groups at the place where a cut fails, until none fails any more."""
    reasons: dict[str, str] = {}
    rest = list(groups)
    while rest and (failure := _failure(twin, rest)) is not None:
        near = _near(twin.place, rest)
        found = _halved(twin, near) or {group.name: failure for group in near}
        reasons |= found
        rest = [group for group in rest if group.name not in found]
    return reasons


def _near(place: str, groups: Sequence[UnitGroup]) -> Sequence[UnitGroup]:
    """Groups with a tensor in a module, or else in the nearest one around it that has some."""
    while place:
        inside = [
            group
            for group in groups
            if any(piece.name.startswith(f"{place}.") for piece in group.slices)
        ]
        if inside:
            return inside
        place = place.rpartition(".")[0]
    return groups


def _halved(twin: Twin, groups: Sequence[UnitGroup]) -> dict[str, str]:
    failure = _failure(twin, groups)
    if failure is None:
        return {}
    if len(groups) == 1:
        return {groups[0].name: failure}
    middle = len(groups) // 2
    return _halved(twin, groups[:middle]) | _halved(twin, groups[middle:])


def _failure(twin: Twin, groups: Sequence[UnitGroup]) -> str | None:
    """Why a cut through groups fails, ``None`` if it does not or nothing can be compared."""
    try:
        plan = plan_of(twin.model, groups, {group.name: _some(group) for group in groups})
        found, _ = twin.difference(plan)
    except Exception as error:
        return _first_line(error)
    if found > TOLERANCES[twin.dtype]:
        return f"{_CHANGED} by {found:.2g} of the largest output"
    return None


def _some(group: UnitGroup) -> Tensor:
    """Two thirds of the units, at least one and not all."""
    units = torch.arange(group.units)
    return units[units % 3 != 1] if group.units > 1 else units


def _copied(model: nn.Module) -> nn.Module:
    with torch.inference_mode(False), torch.no_grad():
        memo: dict[int, Any] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(
                parameter.detach().clone(), requires_grad=parameter.is_floating_point()
            )
        try:
            return copy.deepcopy(model, memo)
        except Exception as error:
            raise ParameterError(
                f"Expected a model that `copy.deepcopy` can copy, got: {_first_line(error)}"
            ) from error


def _move(model: nn.Module, generator: torch.Generator) -> None:
    """Add noise to vectors, which may start at zero or one, and to constant weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            vector = parameter.numel() == max(parameter.shape, default=1)
            if vector or float(parameter.min()) == float(parameter.max()):
                scale = 0.1 if vector else parameter.shape[-1] ** -0.5
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((scale * noise).to(parameter))


def _place(model: nn.Module, dtype: torch.dtype) -> torch.device | None:
    """The CPU, for all of a copy, if ``dtype`` is float64 and a device has none; else as it is."""
    devices = {parameter.device for parameter in model.parameters()}
    if dtype == torch.float64 and not all(map(has_float64, devices)):
        return torch.device("cpu")
    return None


def _input(
    leaf: Any,
    dtype: torch.dtype,
    place: torch.device | None,
    seed: int,
    generator: torch.Generator,
) -> Any:
    """An input in the type of the copy; from seed 1 on, another one of the same kind."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.to(place or leaf.device)
    if leaf.is_floating_point():
        value = leaf.detach().to(dtype)
        if not seed:
            return value
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float32).to(value)
        return value + noise
    return leaf.roll(1, -1) if seed and leaf.dim() and leaf.dtype != torch.bool else leaf


@contextmanager
def _watched(
    model: nn.Module, inner: dict[str, list[Tensor]], running: list[str]
) -> Iterator[None]:
    """Collect what the innermost modules return, and keep track of which modules run."""

    def leave(name: str, module: nn.Module, output: Any) -> None:
        running.pop()
        if not module._modules:
            inner.setdefault(name, []).extend(tensors_in(output))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda _, __, name=name: running.append(name))
            done = module.register_forward_hook(
                lambda module, _, output, name=name: leave(name, module, output)
            )
            stack.callback(enter.remove)
            stack.callback(done.remove)
        yield


def _compare(masked: Sequence[Tensor], shrunk: Sequence[Tensor]) -> tuple[float, int]:
    shapes = [[tuple(tensor.shape) for tensor in outputs] for outputs in (masked, shrunk)]
    if shapes[0] != shapes[1]:
        raise NumericalError(
            f"Expected outputs of shapes {shapes[0]} from the shrunk model, got {shapes[1]}."
        )
    largest, count = 0.0, 0
    for one, other in zip(masked, shrunk, strict=True):
        finite = one.isfinite()
        if not torch.equal(finite, other.isfinite()):
            raise NumericalError(
                "Expected the shrunk model's outputs to be finite where those of the whole one "
                "are, got others: its wiring is not understood."
            )
        compared = int(finite.sum())
        if compared:
            scale = float(one[finite].abs().max()) or 1.0
            largest = max(largest, float((one[finite] - other[finite]).abs().max()) / scale)
        count += compared
    return largest, count


def _compare_inner(
    masked: Mapping[str, list[Tensor]], shrunk: Mapping[str, list[Tensor]]
) -> tuple[float, int]:
    """Compare modules whose outputs keep their shapes, where the model itself returns nothing."""
    largest, count = 0.0, 0
    for name, outputs in masked.items():
        others = shrunk.get(name, [])
        if [tensor.shape for tensor in outputs] == [tensor.shape for tensor in others]:
            found, compared = _compare(outputs, others)
            largest, count = max(largest, found), count + compared
    return largest, count


def _first_other(
    masked: Mapping[str, list[Tensor]], shrunk: Mapping[str, list[Tensor]], tolerance: float
) -> str:
    """Name the first module that returns something else in the same shape."""
    for name, outputs in masked.items():
        others = shrunk.get(name, [])
        if [tensor.shape for tensor in outputs] == [tensor.shape for tensor in others]:
            try:
                if _compare(outputs, others)[0] > tolerance:
                    return name
            except NumericalError:
                return name
    return ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
