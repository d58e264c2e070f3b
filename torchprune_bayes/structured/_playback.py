"""Parts of a model that run before anything that has changed: their outputs, played back.

A loss curve tries one group many times. What the model computes in front of the layers that read
the group is the same each time, so that it is computed once: the parts that are done by then return
copies of what they returned the first time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_bayes.calibration import Batch, Calibration

logger = logging.getLogger("torchprune_bayes")


class Calls:
    """The order in which a model calls its modules, from a run on one sample."""

    def __init__(self, calibration: Calibration, sample: Batch) -> None:
        self._model = calibration.model
        self._starts: dict[nn.Module, list[int]] = {}
        self._ends: dict[nn.Module, list[int]] = {}
        self._time = 0
        with ExitStack() as stack, torch.no_grad():
            for module in self._model.modules():
                start, end = self._noting(self._starts), self._noting(self._ends)
                stack.callback(module.register_forward_pre_hook(start).remove)
                stack.callback(module.register_forward_hook(end).remove)
            calibration.loss(None, sample)

    def done_before(self, changed: Collection[nn.Module]) -> list[nn.Module]:
        """Return the largest modules that are called once and done before any of some others."""
        first = min((self._starts[each][0] for each in changed if each in self._starts), default=0)
        result: list[nn.Module] = []
        inside: set[nn.Module] = set()
        for module in self._model.modules():
            ends = self._ends.get(module, [])
            if module in inside or len(ends) != 1 or ends[0] >= first:
                continue
            if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
                continue
            result.append(module)
            inside.update(module.modules())
        return result

    def _noting(self, times: dict[nn.Module, list[int]]) -> Any:
        def note(module: nn.Module, *_: Any) -> None:
            self._time += 1
            times.setdefault(module, []).append(self._time)

        return note


class Playback:
    """Losses of batches with changes in some modules; what runs before them runs once.

    Args:
        calls: Of the model.
        room: Bytes that outputs may take; if they take more, everything is computed each time.
        batches: The batches.
        loss_of: Runs the model on one of them, with the changes.
    """

    def __init__(
        self,
        calls: Calls,
        room: float,
        batches: Sequence[Batch],
        loss_of: Callable[[Batch], float],
    ) -> None:
        self._calls, self._room = calls, room
        self._batches, self._loss_of = batches, loss_of
        self._changed: set[nn.Module] | None = None
        self._outputs: list[dict[nn.Module, Any]] = []

    def losses(self, changed: Collection[nn.Module]) -> list[float]:
        """Return the loss of each batch.

        Args:
            changed: All modules that are not as they were, or are about to change.
        """
        if self._changed is None or not set(changed) <= self._changed:
            return self._recorded(changed)
        if not self._outputs:
            return [self._loss_of(batch) for batch in self._batches]
        return [self._played(index) for index in range(len(self._batches))]

    def _recorded(self, changed: Collection[nn.Module]) -> list[float]:
        self._changed, self._outputs = set(changed), []
        modules = self._calls.done_before(changed)
        losses, held = [], 0
        for batch in self._batches:
            outputs: dict[nn.Module, Any] = {}
            with _kept(modules, outputs):
                losses.append(self._loss_of(batch))
            held += sum(map(_bytes, outputs.values()))
            modules = modules if held <= self._room else []
            self._outputs.append(outputs)
        if not modules or not self._is_exact(losses[0]):
            self._outputs = []
        return losses

    def _is_exact(self, loss: float) -> bool:
        """Whether the first batch has the very same loss: modules may do more than return."""
        try:
            return self._played(0) == loss
        except Exception as error:
            logger.debug("No outputs are played back, since the model fails: %s", error)
            return False

    def _played(self, index: int) -> float:
        with ExitStack() as stack:
            for module, output in self._outputs[index].items():
                vars(module)["forward"] = _returning(output)
                stack.callback(vars(module).pop, "forward")
            return self._loss_of(self._batches[index])


@contextmanager
def _kept(modules: Sequence[nn.Module], outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Keep copies of what modules return, where these are tensors or tuples of some."""

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _is_plain(output):
            outputs[module] = _copied(output)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        yield


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _copied(output)


def _is_plain(output: Any) -> bool:
    if type(output) is tuple:
        return all(map(_is_plain, output))
    return output is None or isinstance(output, Tensor)


def _copied(output: Any) -> Any:
    """A copy, since what follows may write over it."""
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    return output if output is None else output.clone()


def _bytes(output: Any) -> int:
    if isinstance(output, tuple):
        return sum(map(_bytes, output))
    return 0 if output is None else int(output.nbytes)
