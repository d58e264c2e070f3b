"""A copy of a model that is cut and compared with itself, in which nothing hides a wrong wiring."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchprune_bayes._numerics.precision import has_float64
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.structured._comparison import compare, compare_inner, first_other
from torchprune_bayes.structured._replacement import replacement
from torchprune_bayes.structured.slicing import ShrinkPlan, apply_plan, first_names
from torchprune_bayes.wiring.forward import ForwardFunction, at_rest, run, tensors_in

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6}
"""Largest difference that can be rounding, relative to the largest output.

Right plans differ by 1e-8 to 1e-6 in single precision. Models that compute a part in single
precision whatever their type keep double precision from telling more.
"""


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
                f"{first_line(error)}: its wiring is not understood, and the model is left as it "
                "was."
            ) from error
        finally:
            change.undo()
        _, tensors = first_names(self.model)
        padded = {name: plan.masked(name, tensors[name].detach()) for name in plan.kept}
        change = replacement(self.model, padded, lambda name, gradient: gradient, {})
        try:
            masked, inner = self._outputs()
        finally:
            change.undo()
        found = compare(masked, shrunk)
        if not found[1]:
            found = compare_inner(inner, inner_shrunk)
        if found[0] > TOLERANCES[self.dtype]:
            self.place = first_other(inner, inner_shrunk, TOLERANCES[self.dtype])
        return found

    def _outputs(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        inner: dict[str, list[Tensor]] = {}
        running = [""]
        try:
            with at_rest(self.model), _watched(self.model, inner, running):
                return tensors_in(run(self.model, self._inputs, self._forward_fn)), inner
        finally:
            self.place = running[-1]


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


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
                f"Expected a model that `copy.deepcopy` can copy, got: {first_line(error)}"
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
