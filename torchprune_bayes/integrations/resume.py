"""Resuming training and long calibration after a kill, in your own training loop.

>>> import tempfile
>>> from torch import nn
>>> from torchprune_bayes import GradualPruner, cubic
>>> model = nn.Linear(8, 8)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> pruner = GradualPruner(model, "magnitude", cubic(0.5, 1, 3), optimizer=optimizer)
>>> parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
>>> with tempfile.TemporaryDirectory() as folder:
...     save_training(f"{folder}/last.pt", step=7, **parts)
...     load_training(f"{folder}/last.pt", **parts)
7
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from torchprune_bayes._files import reading
from torchprune_bayes.calibration import CheckpointedCalibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations._restoring import parts_kept_on_error
from torchprune_bayes.structured import (
    ShrinkPlan,
    ShrinkReport,
    Stages,
    apply_plan,
    shrink,
    slice_ema,
    slice_optimizer,
)
from torchprune_bayes.training import GradualPruner

__all__ = [
    "CheckpointedCalibration",
    "ResumableShrink",
    "Stateful",
    "load_training",
    "save_training",
]


class Stateful(Protocol):
    """Models, optimizers, learning rate schedulers, pruners, averaged models."""

    def state_dict(self) -> Any:
        """The state to save."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Load a saved state."""


def save_training(path: str | Path, *, step: int, **parts: Stateful) -> None:
    """Write the state of a training as one file, which is complete or absent.

    It is written to a temporary file that is renamed when it is complete, so a process
    that is killed at any moment leaves the last checkpoint or this one, never a partial or mixed
    one.

    Args:
        path: The file.
        step: Number of updates so far.
        parts: Objects with a ``state_dict``, by any names: model, optimizer, pruner, scheduler, ...
            Random states of torch and of Python are saved too.
    """
    path = Path(path)
    content = {
        "step": step,
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "random": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_training(path: str | Path, **parts: Stateful) -> int:
    """Restore everything as saved by :func:`save_training`, with the same names of the parts.

    Args:
        path: The file; it is read with ``weights_only``, so it can run no code.
        parts: The saved parts, newly made: pruners may have changed the names in a model, and
            :class:`ResumableShrink` its sizes, so they are restored before the others.

    Returns:
        Number of updates so far; 0, with nothing changed, if there is no such file.

    Raises:
        ArgumentError: If the file is damaged, or holds other parts or parts that do not fit.

    If anything fails, all parts and random states are restored, which costs a copy
    of them.
    """
    if not Path(path).is_file():
        return 0
    with reading(path, "a training"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        saved, step = dict(content["parts"]), int(content["step"])
    if set(saved) != set(parts):
        raise ArgumentError(
            f"Expected the parts {sorted(saved)} of the checkpoint, got {sorted(parts)}."
        )
    first = (GradualPruner, ResumableShrink)
    touched = [other for part in parts.values() for other in _touched_by(part)]
    with (
        parts_kept_on_error([*parts.values(), *touched]),
        reading(path, "a training of these parts"),
    ):
        for name in sorted(parts, key=lambda name: not isinstance(parts[name], first)):
            parts[name].load_state_dict(saved[name])
        random.setstate(content["random"])
        torch.set_rng_state(content["torch"])
        if content["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["cuda"])
    return step


def _touched_by(part: Stateful) -> list[Any]:
    """Other objects that a part changes when it loads a state."""
    if isinstance(part, GradualPruner):
        return [part.space.model]
    if isinstance(part, ResumableShrink):
        return [part._model, *part._ema, *([] if part._optimizer is None else [part._optimizer])]
    return []


class ResumableShrink:
    """Shrinks a model in training, and shrinks a new one equally when training is resumed.

    A part of :func:`save_training` and :func:`load_training`: its state records the cuts, so that
    model, optimizer and averages built whole get the sizes of the checkpoint before they are
    loaded.

    Args:
        model: The model, built as at the start of the training.
        optimizer: The optimizer that trains it.
        ema: Averaged copies of the model.

    Example:
        >>> from torch import nn
        >>> from torchprune_bayes.structured import L1FilterImportance
        >>> def make():
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        ...     return model, ResumableShrink(model)
        >>> model, shrinking = make()
        >>> example = torch.zeros(1, 4)
        >>> _ = shrinking.shrink(example, L1FilterImportance(), sparsity=0.5, target="channels")
        >>> again, fresh = make()
        >>> fresh.load_state_dict(shrinking.state_dict())
        >>> again
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        ema: Sequence[nn.Module] = (),
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._ema = list(ema)
        self._plans: list[ShrinkPlan] = []
        self._stages = Stages()

    def shrink(self, example_inputs: Any, importance: Any, **options: Any) -> ShrinkReport:
        """Call :func:`~torchprune_bayes.structured.shrink` with these arguments.

        Optimizer and averages are those of the constructor.
        """
        report = shrink(
            self._model,
            example_inputs,
            importance,
            optimizer=self._optimizer,
            ema=self._ema,
            **options,
        )
        self._plans.append(report.plan)
        self._stages.count(report)
        return report

    def shrink_to(
        self, sparsity: float, example_inputs: Any, importance: Callable[[], Any], **options: Any
    ) -> ShrinkReport | None:
        """Shrink to a sparsity of the model at the start, as schedules give it.

        Args:
            sparsity: Fraction of the target to have removed from the whole model.
            example_inputs: See :func:`~torchprune_bayes.structured.shrink`.
            importance: Makes the importance or the calibration, if it is needed.
            options: Further arguments of ``shrink``; always the same ``target``.

        Returns:
            The report; ``None`` if that much is removed already.
        """
        due = self._stages.due(sparsity)
        return (
            None
            if due is None
            else self.shrink(example_inputs, importance(), sparsity=due, **options)
        )

    def state_dict(self) -> dict[str, Any]:
        """The record of the cuts, as tensors and plain values."""
        return {
            "plans": [
                {
                    "kept": {name: dict(kept) for name, kept in plan.kept.items()},
                    "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
                    "attributes": {name: dict(v) for name, v in plan.attributes.items()},
                }
                for plan in self._plans
            ],
            "left": self._stages.left,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut model, optimizer and averages as recorded in a :meth:`state_dict`.

        Raises:
            ArgumentError: If something was cut here already, or the cuts do not fit the model.
        """
        if not state["plans"]:
            # Also if loading failed and the model is whole again.
            self._plans, self._stages = [], Stages()
            return
        if self._plans:
            raise ArgumentError(
                "Expected a model of its original size, got one that was shrunk: build it again."
            )
        for saved in state["plans"]:
            shapes = {name: tuple(shape) for name, shape in saved["shapes"].items()}
            plan = ShrinkPlan(saved["kept"], shapes, saved["attributes"])
            change = apply_plan(self._model, plan)
            if self._optimizer is not None:
                slice_optimizer(self._optimizer, plan, change.parameters)
            for average in self._ema:
                slice_ema(average, plan)
            self._plans.append(plan)
        self._stages = Stages(state["left"])
