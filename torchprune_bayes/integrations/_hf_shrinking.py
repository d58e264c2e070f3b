"""Shrinking while ``transformers.Trainer`` trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from torchprune_bayes._checks import check_count
from torchprune_bayes._distributed import is_distributed
from torchprune_bayes._extras import optional
from torchprune_bayes.calibration.batches import map_tensors
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.integrations._hf_events import records_of
from torchprune_bayes.integrations._hf_resume import checkpoint_folder, forget_best
from torchprune_bayes.integrations._ranks import refuse_sharded
from torchprune_bayes.schedules import Schedule
from torchprune_bayes.structured import (
    ShrinkReport,
    Stages,
    check_shrinkable,
    save_shrunk,
    shrink,
)
from torchprune_bayes.structured.option_checks import check_later_call
from torchprune_bayes.structured.support import OF_THE_MODEL
from torchprune_bayes.training import bare_optimizer

with optional("transformers", "hf"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("torchprune_bayes")

Importances: TypeAlias = Callable[[nn.Module], Any]
RECORD = "torchprune_bayes.shrinking"
"""Key under which ``trainer_state.json`` keeps how much of the whole model is left."""


class ShrinkingCallback(TrainerCallback):
    """Remove channels, hidden units and heads of a model while a Trainer trains it.

    At once, or along a schedule with training between the cuts, as SNAP-it does: each cut scores
    the remaining units again. The optimizer's state is cut too, so training continues with their
    momentum. Whether the model can be shrunk that far is checked when training begins.

    Every checkpoint after the first cut also holds ``shrunk.safetensors`` and ``shrunk.json``. To
    resume, or to use the model, build the whole one and pass it to
    :func:`~torchprune_bayes.structured.load_shrunk` with the checkpoint's folder first; the
    Trainer itself would refuse the sizes. The best metric so far is forgotten at a cut, so that
    ``load_best_model_at_end`` compares models of one size.

    Args:
        importance: A function ``model -> importance``, called before every cut. It returns a
            calibration, which is the recommended way, see
            :func:`~torchprune_bayes.structured.shrink`; or an importance of
            :mod:`torchprune_bayes.structured` or of torch-pruning.
        example_inputs: See :func:`~torchprune_bayes.structured.shrink`; moved to the model's
            device.
        at: Update after which to cut, 0 for before training; without a schedule.
        schedule: Sparsity of the whole model after each update; or a function that makes it from
            the number of updates of the training.
        options: Further arguments of :func:`~torchprune_bayes.structured.shrink`, such as
            ``sparsity`` (without a schedule), ``target`` and ``ignored``.

    Attributes:
        reports: One report for each cut.
        left: Fraction of the target that remains of the whole model.

    Raises:
        ArgumentError: If there is a schedule and a sparsity or ``at``, or an option has an
            impossible value. When training begins: if there are no units to remove, or too few for
            the sparsity, or it ends before the first cut.
        ArgumentTypeError: If ``importance`` is no function of the model, or there is no such
            option.
        ParameterError: When training begins: if the model cannot be shrunk, or there are several
            processes, where the model is wrapped already. Shrink it before the Trainer is made,
            or use :func:`~torchprune_bayes.integrations.accelerate.shrink_distributed`.

    Example:
        >>> from torchprune_bayes import cubic
        >>> from torchprune_bayes.structured import L1FilterImportance
        >>> callback = ShrinkingCallback(
        ...     lambda model: L1FilterImportance(),
        ...     example_inputs=None,
        ...     schedule=lambda updates: cubic(0.5, begin=0, end=updates // 2, times=4),
        ... )
        >>> callback.left
        1.0
    """

    def __init__(
        self,
        importance: Importances,
        example_inputs: Any,
        *,
        at: int = 0,
        schedule: Schedule | Callable[[int], Schedule] | None = None,
        **options: Any,
    ) -> None:
        check_count("at", at, minimum=0)
        if schedule is not None and (at or "sparsity" in options):
            raise ArgumentError("Expected a `schedule`, or `sparsity` and `at`, got both.")
        if schedule is None and "sparsity" not in options and options.get("target") != "evidence":
            raise ArgumentError("Expected a `sparsity`, or a `schedule` of it, got neither.")
        check_later_call(importance, options)
        self.reports: list[ShrinkReport] = []
        self._importance = importance
        self._example_inputs = example_inputs
        self._at = at
        self._schedule = schedule
        self._options = options
        self._stages = Stages()

    @property
    def report(self) -> ShrinkReport | None:
        """Report of the last cut; ``None`` before it."""
        return self.reports[-1] if self.reports else None

    @property
    def left(self) -> float:
        """Fraction of the target that remains of the whole model."""
        return self._stages.left

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Check that the model can be shrunk; cut if it is due before training."""
        if is_distributed():
            raise ParameterError(
                "Expected one process, got several, where the model is wrapped already: shrink "
                "it before the Trainer is made."
            )
        refuse_sharded(model)
        if callable(self._schedule) and not isinstance(self._schedule, Schedule):
            self._schedule = self._schedule(state.max_steps)
        self._stages = Stages(**records_of(state).get(RECORD, {}))
        self._check(model)
        self._check_time(state.max_steps)
        if not state.global_step:
            self._cut(0, model, optimizer, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Cut if it is due after this update."""
        self._cut(state.global_step, model, optimizer, state)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Write the files to rebuild the shrunk model into the folder of the checkpoint."""
        folder = checkpoint_folder(args, state)
        if RECORD in records_of(state) and args.should_save and folder.is_dir():
            save_shrunk(model, folder)

    def _check(self, model: nn.Module) -> None:
        options = {key: self._options[key] for key in OF_THE_MODEL if key in self._options}
        final = self._options.get("sparsity")
        if isinstance(self._schedule, Schedule):
            final = self._schedule.final
        sparsity = None if final is None else self._stages.due(final)
        units = check_shrinkable(model, self._inputs(model), sparsity=sparsity, **options)
        for name, why in units.left_out.items():
            logger.info("`%s` will be left whole, since %s.", name, why)

    def _check_time(self, updates: int) -> None:
        first = last = self._at
        if isinstance(self._schedule, Schedule):
            first, last = self._schedule.begin, self._schedule.end or self._schedule.begin
        if first > updates:
            raise ArgumentError(
                f"Expected a first cut within the {updates} updates of the training, got one after "
                f"update {first}: cut earlier, or train longer."
            )
        if last > updates:
            logger.warning(
                "The training ends after %d updates, before the last cut after update %d: the "
                "schedule's final sparsity will not be reached.",
                updates,
                last,
            )

    def _inputs(self, model: nn.Module) -> Any:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return map_tensors(self._example_inputs, lambda tensor: tensor.to(device))

    def _due(self, step: int) -> dict[str, Any] | None:
        """The sparsity to cut to after an update, as an argument of ``shrink``; if it is due."""
        if isinstance(self._schedule, Schedule):
            if not self._schedule.is_due(step):
                return None
            sparsity = self._stages.due(self._schedule(step))
            return None if sparsity is None else {"sparsity": sparsity}
        return {} if step == self._at else None

    def _cut(self, step: int, model: nn.Module, optimizer: Any, state: TrainerState) -> None:
        due = self._due(step)
        if due is None:
            return
        report = shrink(
            model,
            self._inputs(model),
            self._importance(model),
            optimizer=bare_optimizer(optimizer),
            **{**self._options, **due},
        )
        self.reports.append(report)
        self._stages.count(report)
        records_of(state)[RECORD] = {"left": self._stages.left}
        forget_best(state)
