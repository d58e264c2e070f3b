"""A copy of a model that is cut and compared with itself, prepared so that wrong wiring shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from torchprune_bayes._numerics.precision import has_float64
from torchprune_bayes.errors import NumericalError, ParameterError
from torchprune_bayes.structured._comparison import compare, compare_inner, first_other
from torchprune_bayes.structured._replacement import replacement
from torchprune_bayes.structured._twin_inputs import inputs_of_seed, smaller
from torchprune_bayes.structured.slicing import (
    ShrinkPlan,
    apply_plan,
    first_names,
    zero_units,
)
from torchprune_bayes.wiring.forward import ForwardFunction, at_rest, first_line, run, tensors_in
from torchprune_bayes.wiring.operations import noted

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6}
"""Largest difference that can be rounding, relative to the largest output.

Right plans differ by 1e-8 to 1e-6 in single precision. Models that compute a part in single
precision whatever their type keep double precision from telling more.
"""

_Inside: TypeAlias = dict[str, list[Tensor]]
_Look = TypeVar("_Look")


class Twin:
    """A copy of a model that can be cut, compared with itself, and restored.

    Args:
        model: The model, without wrappers.
        example_inputs: What it is called with.
        forward_fn: How to call it otherwise.
        dtype: Floating point type of the copy.
        seed: Seed of the noise on its weights; from seed 1 on its inputs differ too.
        operations: What runs on the example inputs, one after the other, if it is known. Then a
            convolutional model that runs the same on smaller images is compared on these, see
            :func:`~torchprune_bayes.structured._twin_inputs.smaller`; images of the example's size
            decide where it does not, or where it differs.

    Attributes:
        model: The copy.
        dtype: Its type.

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
        *,
        operations: Sequence[str] = (),
    ) -> None:
        self._device = _place(model, dtype)
        self.model = _copied(model).to(self._device, dtype)
        self.dtype = dtype
        self._example_inputs, self._forward_fn = example_inputs, forward_fn
        self._operations = tuple(operations)
        self.move(seed)

    def move(self, seed: int) -> None:
        """Move the weights, on from where they are, and take the inputs of a seed."""
        self._response: float | None = None
        generator = torch.Generator().manual_seed(seed)
        _move(self.model, generator)
        self._inputs = inputs_of_seed(
            self._example_inputs, self.dtype, self._device, seed, generator
        )
        self._smaller = smaller(self.model, self._inputs) if self._operations else None

    def difference(self, plan: ShrinkPlan, *, put_back: bool = True) -> tuple[float, int]:
        """Compare the copy after a cut with itself before it, with zeros for removed entries.

        Outputs that rounding alone would change as much, such as the best boxes of a detector whose
        scores are close to each other, are no evidence: there what the modules inside return
        decides.

        Args:
            plan: The cut.
            put_back: Whether other plans can be tried afterwards; without it what goes stays zero,
                which is cheaper.

        Returns:
            The largest difference, relative to the largest output, and how many entries were
            compared.

        Raises:
            ParameterError: If the cut copy does not run.
            NumericalError: If outputs have other shapes or are not finite at other places.
        """
        if self._smaller is not None:
            whole, self._inputs, self._smaller = self._inputs, self._smaller, None
            try:
                result = self._difference(plan, put_back, self._operations)
                if result[1] and result[0] <= TOLERANCES[self.dtype]:
                    return result
            except (NumericalError, ParameterError):
                pass  # the images of the example decide
            finally:
                self._inputs, self._response = whole, None
        return self._difference(plan, put_back)

    def _difference(
        self, plan: ShrinkPlan, put_back: bool, operations: Sequence[str] = ()
    ) -> tuple[float, int]:
        try:
            shrunk = self._cut(plan, self._outputs)
        except Exception as error:
            raise ParameterError(
                "Expected the shrunk model to run on the example inputs, got "
                f"{first_line(error)}: its wiring is not understood, and the model is left as it "
                "was."
            ) from error
        failure: NumericalError | None = None
        with self._masked(plan, put_back):
            masked = self._outputs(operations)
            try:
                result = compare(masked, shrunk)
            except NumericalError as error:
                failure, result = error, (float("inf"), 1)
            if result[1] and not self._jumps(masked, result[0]):
                if failure is not None:
                    raise failure
                return result
            inside = self._inside()
        within = compare_inner(inside, self._cut(plan, self._inside))
        if not result[1] or (within[1] and within[0] <= TOLERANCES[self.dtype]):
            return within
        if failure is not None:
            raise failure
        return result

    def place(self, plan: ShrinkPlan) -> str:
        """Where a cut goes wrong.

        Returns:
            The innermost module that does not run, or the first whose output differs; empty if only
            what the model makes of these does.
        """
        running = [""]
        try:
            cut = self._cut(plan, partial(self._inside, running))
        except Exception:
            return running[-1]
        with self._masked(plan, True):
            return first_other(self._inside(), cut, TOLERANCES[self.dtype])

    def _jumps(self, outputs: list[Tensor], difference: float) -> bool:
        """Whether a difference is no rounding, but noise of its size makes about the same."""
        tolerance = TOLERANCES[self.dtype]
        if difference <= tolerance:
            return False
        if self._response is None:
            self._response = self._moved_by(0.1 * tolerance, outputs)
        return self._response >= max(tolerance, difference / 10)

    def _moved_by(self, scale: float, outputs: list[Tensor]) -> float:
        """How far noise on all weights moves the outputs."""
        generator = torch.Generator().manual_seed(0)
        noisy = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            noisy[name] = parameter.detach() * (1 + scale * noise.to(parameter))
        change = replacement(self.model, noisy, lambda name, gradient: gradient, {})
        try:
            return compare(outputs, self._outputs())[0]
        except NumericalError:
            return float("inf")
        finally:
            change.undo()

    def _cut(self, plan: ShrinkPlan, look: Callable[[], _Look]) -> _Look:
        change = apply_plan(self.model, plan)
        try:
            return look()
        finally:
            change.undo()

    @contextmanager
    def _masked(self, plan: ShrinkPlan, put_back: bool) -> Iterator[None]:
        """Zeros in place of what goes."""
        if not put_back:
            zero_units(self.model, plan)
            yield
            return
        _, tensors = first_names(self.model)
        padded = {name: plan.masked(name, tensors[name].detach()) for name in plan.kept}
        change = replacement(self.model, padded, lambda name, gradient: gradient, {})
        try:
            yield
        finally:
            change.undo()

    def _outputs(self, operations: Sequence[str] = ()) -> list[Tensor]:
        """What the model returns.

        Raises:
            NumericalError: If ``operations`` are given and others run.
        """
        with at_rest(self.model), noted(self.model) if operations else nullcontext() as seen:
            result = tensors_in(run(self.model, self._inputs, self._forward_fn))
        if seen is not None and tuple(seen) != tuple(operations):
            raise NumericalError("Expected the operations of the example inputs, got others.")
        return result

    def _inside(self, running: list[str] | None = None) -> _Inside:
        """What the innermost modules return, and in ``running`` which modules have not ended."""
        inside: _Inside = {}
        running = [""] if running is None else running
        with at_rest(self.model), _watched(self.model, inside, running):
            run(self.model, self._inputs, self._forward_fn)
        return inside


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


@contextmanager
def _watched(
    model: nn.Module, inner: dict[str, list[Tensor]], running: list[str]
) -> Iterator[None]:
    """Collect the outputs of the innermost modules, and keep track of which modules run."""

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
