"""Running a model on example inputs without side effects on it or on the random generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchprune_bayes.calibration.functional import preserved
from torchprune_bayes.calibration.randomness import IsolatedRandomness
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError, TorchPruneBayesError

ForwardFunction: TypeAlias = Callable[[nn.Module, Any], Any]


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes, buffers and generators are restored."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
    with preserved(model), IsolatedRandomness(0, device), torch.no_grad():
        try:
            yield
        finally:
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def run(model: nn.Module, example_inputs: Any, forward_fn: ForwardFunction | None = None) -> Any:
    """Call the model: a mapping gives keywords, a tuple or list positions, a tensor is the input.

    Raises:
        ArgumentTypeError: If the inputs are none of these and there is no ``forward_fn``.
    """
    if forward_fn is not None:
        return forward_fn(model, example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, Tensor):
        return model(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    raise ArgumentTypeError(
        "Expected `example_inputs` to be a tensor, a tuple of positional arguments or a mapping of "
        f"keyword arguments, got {type(example_inputs).__name__}."
    )


@contextmanager
def blaming_inputs(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFunction | None
) -> Iterator[None]:
    """If the body fails and so does a plain run of the model, say that it is the inputs.

    Raises:
        ArgumentError: In the place of what the model raised.
    """
    try:
        yield
    except TorchPruneBayesError:
        raise
    except Exception:
        try:
            with at_rest(model):
                run(model, example_inputs, forward_fn)
        except TorchPruneBayesError:
            raise
        except Exception as error:
            raise ArgumentError(
                f"Expected the model to run on `example_inputs`, got {first_line(error)}: pass "
                "inputs as it is called with, or `forward_fn` for another way to call it."
            ) from error
        raise


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def tensors_in(output: Any) -> list[Tensor]:
    """Return the floating point tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return tensors_in(list(output.values()))
    if isinstance(output, Sequence) and not isinstance(output, (str, bytes)):
        return [tensor for part in output for tensor in tensors_in(part)]
    return []
