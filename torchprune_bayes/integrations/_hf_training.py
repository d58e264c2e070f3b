"""Bayesian training inside ``transformers.Trainer``: marginal likelihood and noise gates."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchprune_bayes._checks import check_count
from torchprune_bayes._extras import optional
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations._hf_resume import checkpoint_folder, resume_folders
from torchprune_bayes.integrations._ranks import refuse_sharded
from torchprune_bayes.params import prunable_parameters, unwrap
from torchprune_bayes.training import GateTraining, SpaM, bare_optimizer
from torchprune_bayes.types import ParameterPairs

with optional("transformers", "hf"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class _Kept(TrainerCallback):
    """Keeps the state of what it drives in each checkpoint, and takes it from there on resume."""

    file_name: str
    training: Any = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the state into the folder of the checkpoint, whole or not at all."""
        folder = checkpoint_folder(args, state)
        if self.training is None or not args.should_save or not folder.is_dir():
            return
        partial = folder / f"{self.file_name}.partial"
        torch.save(self.training.state_dict(), partial)
        os.replace(partial, folder / self.file_name)

    def _take_up(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.global_step:
            return
        folders = resume_folders(args, state)
        found = next((f for f in folders if (f / self.file_name).is_file()), None)
        if found is None:
            raise ArgumentError(
                f"Expected `{self.file_name}` in {folders[0]} to go on from, got none: put it "
                "there, beside the checkpoint that is resumed."
            )
        held = torch.load(found / self.file_name, map_location="cpu", weights_only=True)
        self.training.load_state_dict(held)


class SpaMCallback(_Kept):
    """Learn prior precisions by the marginal likelihood, once per epoch, while a Trainer trains.

    The prior is the weight decay, so ``TrainingArguments(weight_decay=0.0)``. Afterwards prune with
    :class:`~torchprune_bayes.OPD` and ``posterior=callback.training.posterior()``.

    Args:
        calibration: A function ``(model, params) -> Calibration``, such as
            :func:`~torchprune_bayes.integrations.hf.calibrate_on` makes.
        params: A function from the model to its ``(module, name)`` pairs that have the prior;
            default :func:`~torchprune_bayes.prunable_parameters`.
        options: Arguments of :class:`~torchprune_bayes.training.SpaM`; for a language model with
            ``labels_per_sample``, the tokens of a sequence that have a label.

    Attributes:
        training: The :class:`~torchprune_bayes.training.SpaM` at work.
    """

    file_name = "spam.pt"

    def __init__(
        self,
        calibration: Callable[[nn.Module, ParameterPairs], Calibration],
        *,
        params: Callable[[nn.Module], ParameterPairs] = prunable_parameters,
        **options: Any,
    ) -> None:
        self.training: SpaM | None = None
        self._calibration = calibration
        self._params = params
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
        """Put the prior into the optimizer."""
        refuse_sharded(model)
        inner = unwrap(model)
        calibration = self._calibration(inner, self._params(inner))
        self.training = SpaM(bare_optimizer(optimizer), calibration, **self._options)
        self._take_up(args, state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Update the prior if it is due; stop when the evidence no longer rises."""
        assert self.training is not None
        self.training.step()
        control.should_training_stop |= self.training.finished

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the last log marginal likelihood to what is logged."""
        if logs is None or self.training is None or not self.training.history:
            return
        found = self.training.history[-1]["log_marginal_likelihood"]
        logs["log_marginal_likelihood"] = found
        state.log_history[-1]["log_marginal_likelihood"] = found


class GateCallback(_Kept):
    """Learn and close noise gates while a Trainer trains; the algorithm of BMRS.

    Attach the gates to the model before the Trainer is made. Their penalty depends on them alone,
    so its gradient is added right before the update, after clipping and averaging over processes.
    To let gates learn faster, hand the Trainer an optimizer over
    :func:`~torchprune_bayes.training.gate_parameter_groups`.

    Args:
        finetune_epochs: Epochs at the end in which no gate closes any more.
        options: Arguments of :class:`~torchprune_bayes.training.GateTraining`.

    Attributes:
        training: The :class:`~torchprune_bayes.training.GateTraining` at work.

    Raises:
        ArgumentError: When training begins: if the model has no gates, or with ``fp16``, whose
            gradients are scaled.
    """

    file_name = "gates.pt"

    def __init__(self, *, finetune_epochs: int = 0, **options: Any) -> None:
        check_count("finetune_epochs", finetune_epochs, minimum=0)
        self.training: GateTraining | None = None
        self._finetune_epochs = finetune_epochs
        self._options = options

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Find the gates."""
        if args.fp16:
            raise ArgumentError("Expected bf16 or full precision for gates, got fp16.")
        refuse_sharded(model)
        self.training = GateTraining(unwrap(model), **self._options)
        self._take_up(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the gradient of the penalty."""
        assert self.training is not None
        gates = self.training.gates.parameters()
        # Not `backward`: it would set off the hooks of DistributedDataParallel.
        found = torch.autograd.grad(self.training.penalty(), gates, allow_unused=True)
        for parameter, gradient in zip(gates, found, strict=True):
            if gradient is not None:
                held = parameter.grad
                parameter.grad = gradient if held is None else held + gradient

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the gates' parameters back into their box."""
        assert self.training is not None
        self.training.step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close gates if it is due."""
        assert self.training is not None
        self.training.end_epoch()
        left = state.num_train_epochs - len(self.training.history)
        if left == self._finetune_epochs and not self.training.finetuning:
            self.training.begin_finetuning()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the share of closed gates to what is logged."""
        if logs is None or self.training is None:
            return
        gates = self.training.gates
        logs["closed_gates"] = state.log_history[-1]["closed_gates"] = gates.closed / gates.units
