"""Training and long calibration that go on where they were killed, in a training loop of your own.

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

import copy
import hashlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_bayes._files import reading
from torchprune_bayes._numerics.live_vector import LiveVector
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.calibration._batches import Batch, samples_in
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations._checkpoints import fingerprint
from torchprune_bayes.integrations._restoring import parts_kept_on_error
from torchprune_bayes.structured import (
    ShrinkPlan,
    ShrinkReport,
    apply_plan,
    shrink,
    slice_ema,
    slice_optimizer,
)
from torchprune_bayes.training import GradualPruner


class Stateful(Protocol):
    """Models, optimizers, learning rate schedulers, pruners, averaged models."""

    def state_dict(self) -> Any:
        """What there is to save."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go on from what was saved."""


def save_training(path: str | Path, *, step: int, **parts: Stateful) -> None:
    """Write the state of a training as one file, which is whole or not there.

    It goes to a file beside it first and takes its name when all of it is on the disk, so a process
    that is killed at any moment leaves the last checkpoint or this one, never a part or a mixture.

    Args:
        path: The file.
        step: Updates that are done.
        parts: By any names, what has a ``state_dict``: model, optimizer, pruner, scheduler, ...
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
    """Put everything back as :func:`save_training` found it; same names of the parts.

    Args:
        path: The file; it is read with ``weights_only``, so it can run no code.
        parts: What was saved, made anew: pruners may have changed the names in a model, and
            :class:`ResumableShrink` its sizes, so they are restored before the others.

    Returns:
        Updates that are done; 0, with nothing changed, if there is no such file.

    Raises:
        ArgumentError: If the file is damaged, or holds other parts or such as do not fit.

    If anything fails, all parts and random states are as they were; until then, which costs a copy
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
    """What else a part changes when it takes up a state."""
    if isinstance(part, GradualPruner):
        return [part.space.model]
    if isinstance(part, ResumableShrink):
        return [part._model, *part._ema, *([] if part._optimizer is None else [part._optimizer])]
    return []


class ResumableShrink:
    """Shrinks a model in training, and cuts a fresh one in the same way when training is resumed.

    A part of :func:`save_training` and :func:`load_training`: its state says what was cut, so that
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

    def shrink(self, example_inputs: Any, importance: Any, **options: Any) -> ShrinkReport:
        """Call :func:`~torchprune_bayes.structured.shrink`, whose arguments it takes.

        Optimizer and averages are those it was made with.
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
        return report

    def state_dict(self) -> dict[str, Any]:
        """What was cut, as tensors and plain values."""
        return {
            "plans": [
                {
                    "kept": {name: dict(kept) for name, kept in plan.kept.items()},
                    "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
                    "attributes": {name: dict(v) for name, v in plan.attributes.items()},
                }
                for plan in self._plans
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut model, optimizer and averages as it was done before :meth:`state_dict` was taken.

        Raises:
            ArgumentError: If something was cut here already, or the cuts do not fit the model.
        """
        if not state["plans"]:
            self._plans = []  # also where loading failed and the model is whole again
            return
        if self._plans:
            raise ArgumentError("Expected a model that is still whole, got one that was shrunk.")
        for saved in state["plans"]:
            shapes = {name: tuple(shape) for name, shape in saved["shapes"].items()}
            plan = ShrinkPlan(saved["kept"], shapes, saved["attributes"])
            change = apply_plan(self._model, plan)
            if self._optimizer is not None:
                slice_optimizer(self._optimizer, plan, change.parameters)
            for average in self._ema:
                slice_ema(average, plan)
            self._plans.append(plan)


class CheckpointedCalibration(Calibration):
    """A calibration that keeps gradients in a folder, so that collecting goes on where it stopped.

    Each part of a pass is written when it is done, and read again by any later pass at the same
    weights, masks and draw, in this process or another. A restarted pass draws the samples that are
    done, without computing with them. Delete the folder when the curvature is fitted.

    Args:
        folder: Where to keep them; made if it is not there.
        args: Arguments of :class:`~torchprune_bayes.Calibration`.
        options: Arguments of :class:`~torchprune_bayes.Calibration`.

    Raises:
        ArgumentError: With ``fisher="true"``, whose labels are drawn along the way.

    Cost: ``4 N D`` bytes in the folder for each pass at new weights or of another range.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> model = nn.Linear(4, 2)
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     calibration = CheckpointedCalibration(
        ...         folder, model, data, nn.functional.cross_entropy
        ...     )
        ...     first = list(calibration.gradients())
        ...     all(map(torch.equal, first, calibration.gradients()))  # read, not computed
        True
    """

    def __init__(self, folder: str | Path, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.fisher == "true":
            raise ArgumentError("Expected fisher='empirical' for kept gradients, got 'true'.")
        self.folder = Path(folder)
        self._done = 0

    def gradients(
        self,
        weights: Mapping[str, Tensor] | None = None,
        live: LiveVector | None = None,
        span: tuple[int, int] | None = None,
    ) -> Iterator[Tensor]:
        """Stream the gradients, those that are kept first."""
        live = LiveVector(self.space.masks()) if live is None else live
        folder = self.folder / self._key(weights, live, span)
        folder.mkdir(parents=True, exist_ok=True)
        index = done = 0
        while (path := folder / f"{index:06d}.safetensors").is_file():
            rows = load_file(path)["rows"].to(self.device)
            index, done = index + 1, done + len(rows)
            yield rows
        if done == self.num_gradients:
            return
        rest = copy.copy(self)
        rest._done = done * self.mini_batch
        for number, rows in enumerate(
            super(CheckpointedCalibration, rest).gradients(weights, live, span)
        ):
            path = folder / f"{index + number:06d}.safetensors"
            partial = path.with_suffix(".partial")
            save_file({"rows": rows.contiguous()}, partial)
            os.replace(partial, path)
            yield rows

    def _groups(self, size: int) -> Iterator[list[Batch]]:
        passed = 0
        for pieces in super()._groups(size):
            if passed >= self._done:
                yield pieces
            passed += samples_in(pieces)

    def _key(
        self, weights: Mapping[str, Tensor] | None, live: LiveVector, span: tuple[int, int] | None
    ) -> str:
        """What the gradients depend on, as far as it changes while a model is pruned."""
        _, state = self._functional.bind(weights)
        digest = hashlib.sha256(save({n: v.contiguous() for n, v in state.items()}))
        digest.update(fingerprint(live.masks).encode())
        digest.update(repr((span, self.seed, self.num_samples, self.mini_batch)).encode())
        return digest.hexdigest()[:24]
