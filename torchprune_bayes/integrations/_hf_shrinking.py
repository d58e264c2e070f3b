"""Shrinking while ``transformers.Trainer`` trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torchprune_bayes._checks import check_count
from torchprune_bayes._extras import optional
from torchprune_bayes._processes import several
from torchprune_bayes.errors import ParameterError
from torchprune_bayes.integrations._hf_resume import checkpoint_folder, forget_best
from torchprune_bayes.integrations._ranks import refuse_sharded
from torchprune_bayes.structured import ShrinkReport, save_shrunk, shrink
from torchprune_bayes.training import bare_optimizer

with optional("transformers", "hf"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ShrinkingCallback(TrainerCallback):
    """Cut channels, hidden units and heads out of a model while a Trainer trains it.

    The optimizer's state follows, so training goes on with the momentum of what is left. Every
    checkpoint after the cut also holds ``shrunk.safetensors`` and ``shrunk.json``. To resume, or to
    use the model, build the whole one and hand it to
    :func:`~torchprune_bayes.structured.load_shrunk` with the checkpoint's folder first; the
    Trainer itself would refuse the sizes. The best metric so far is forgotten at the cut, so that
    ``load_best_model_at_end`` compares models of one size.

    Args:
        importance: A function ``model -> importance``; the importance is one of
            :mod:`torchprune_bayes.structured` or of torch-pruning.
        example_inputs: See :func:`~torchprune_bayes.structured.shrink`.
        at: Update after which to cut, 0 for before training.
        options: Further arguments of :func:`~torchprune_bayes.structured.shrink`, such as
            ``sparsity``, ``target`` and ``ignored``.

    Attributes:
        report: What was cut; ``None`` before.

    Raises:
        ParameterError: When training begins: if there are several processes, in which the model is
            wrapped already. Shrink it before the Trainer is made, or use
            :func:`~torchprune_bayes.integrations.accelerate.shrink_together`.
    """

    def __init__(
        self,
        importance: Callable[[nn.Module], Any],
        example_inputs: Any,
        *,
        at: int = 0,
        **options: Any,
    ) -> None:
        check_count("at", at, minimum=0)
        self.report: ShrinkReport | None = None
        self._importance = importance
        self._example_inputs = example_inputs
        self._at = at
        self._options = options

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
        """Cut if it is due before training."""
        if several():
            raise ParameterError(
                "Expected one process, got several, in which the model is wrapped already: shrink "
                "it before the Trainer is made."
            )
        refuse_sharded(model)
        self._cut_at(0, model, optimizer, state)

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
        self._cut_at(state.global_step, model, optimizer, state)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Write what rebuilds the shrunk model into the folder of the checkpoint."""
        folder = checkpoint_folder(args, state)
        if state.global_step >= self._at and args.should_save and folder.is_dir():
            save_shrunk(model, folder)

    def _cut_at(self, step: int, model: nn.Module, optimizer: Any, state: TrainerState) -> None:
        if step != self._at or (step == 0 and state.global_step):
            return
        self.report = shrink(
            model,
            self._example_inputs,
            self._importance(model),
            optimizer=bare_optimizer(optimizer),
            **self._options,
        )
        forget_best(state)
