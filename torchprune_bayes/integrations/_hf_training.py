"""Bayesian training inside ``transformers.Trainer``: marginal likelihood and noise gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchprune_bayes._checks import check_count
from torchprune_bayes._distributed import entered_on_all_ranks, on_all_ranks
from torchprune_bayes._extras import optional
from torchprune_bayes._files import reading, write_whole
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations._hf_events import AtEpochEnds, FirstToLog
from torchprune_bayes.integrations._hf_resume import checkpoint_folder, resume_folders
from torchprune_bayes.integrations._ranks import refuse_sharded
from torchprune_bayes.params import prunable_parameters, unwrap
from torchprune_bayes.training import GateTraining, SpaM
from torchprune_bayes.types import ParameterPairs

with optional("transformers", "hf"):
    from transformers import TrainerControl, TrainerState, TrainingArguments


class _Kept(FirstToLog, AtEpochEnds):
    """Saves the state of its training object in each checkpoint, and loads it on resume."""

    file_name: str
    training: Any = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the state into the folder of the checkpoint, completely or not at all."""
        if self.training is not None:
            on_all_ranks(lambda: self._save(args, state))

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = checkpoint_folder(args, state)
        if args.should_save and folder.is_dir():
            saved = self.training.state_dict()
            write_whole(folder / self.file_name, lambda draft: torch.save(saved, draft))

    def _take_up(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.global_step:
            return
        folders = resume_folders(args, state)
        folder = next((f for f in folders if (f / self.file_name).is_file()), None)
        if folder is None:
            raise ArgumentError(
                f"Expected `{self.file_name}` in {folders[0]} to resume from, got none: put it "
                "there, beside the checkpoint that is resumed."
            )
        with reading(folder / self.file_name, "the state of a callback"):
            saved = torch.load(folder / self.file_name, map_location="cpu", weights_only=True)
        self.training.load_state_dict(saved)


class SpaMCallback(_Kept):
    """Learn prior precisions with the marginal likelihood, once per epoch, while a Trainer trains.

    An epoch's update is done at the end of its last step, so that the checkpoint of that step
    includes it. The last log marginal likelihood is logged.

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
        """Add the prior to the optimizer."""

        def begin() -> SpaM:
            refuse_sharded(model)
            inner = unwrap(model)
            calibration = self._calibration(inner, self._params(inner))
            if self.training is not None:  # from an earlier training
                self.training.remove()
            self.training = SpaM(optimizer, calibration, **self._options)
            self._take_up(args, state)
            return self.training

        self.training = on_all_ranks(begin)
        self._move_to_front()
        control.should_training_stop |= self.training.finished

    def end_epoch(self, state: TrainerState, control: TrainerControl) -> None:
        """Update the prior if it is due; stop when the evidence no longer increases."""
        assert self.training is not None
        with entered_on_all_ranks(self.training.stepped):
            pass
        control.should_training_stop |= self.training.finished

    def numbers(self) -> dict[str, float]:
        """The last log marginal likelihood."""
        if self.training is None or not self.training.history:
            return {}
        return {"log_marginal_likelihood": self.training.history[-1]["log_marginal_likelihood"]}


class GateCallback(_Kept):
    """Learn and close noise gates while a Trainer trains; the algorithm of BMRS.

    Gates close at the end of an epoch's last step, so that the checkpoint of that step has them
    closed. Attach the gates to the model before the Trainer is made. Their penalty depends only on
    them, so its gradient is added right before the update, after clipping and averaging over
    processes. To let gates learn faster, pass the Trainer an optimizer over
    :func:`~torchprune_bayes.training.gate_parameter_groups`.

    Args:
        finetune_epochs: Epochs at the end in which no more gates close.
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

        def begin() -> GateTraining:
            if args.fp16:
                raise ArgumentError("Expected bf16 or full precision for gates, got fp16.")
            refuse_sharded(model)
            self.training = GateTraining(unwrap(model), **self._options)
            self._take_up(args, state)
            return self.training

        self.training = on_all_ranks(begin)
        self._move_to_front()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the gradient of the penalty."""
        assert self.training is not None
        gates = self.training.gates.parameters()
        # Not `backward`: it would trigger the hooks of DistributedDataParallel.
        gradients = torch.autograd.grad(self.training.penalty(), gates, allow_unused=True)
        for parameter, gradient in zip(gates, gradients, strict=True):
            if gradient is not None:
                existing = parameter.grad
                parameter.grad = gradient if existing is None else existing + gradient

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the gates' parameters back into their bounds."""
        assert self.training is not None
        self.training.step()

    def end_epoch(self, state: TrainerState, control: TrainerControl) -> None:
        """Close gates if it is due."""
        training = self.training
        assert training is not None

        def close() -> None:
            training.end_epoch()
            left = state.num_train_epochs - len(training.history)
            if left == self._finetune_epochs and not training.finetuning:
                training.begin_finetuning()

        with training.kept_on_error():
            on_all_ranks(close)

    def numbers(self) -> dict[str, float]:
        """The share of closed gates."""
        if self.training is None:
            return {}
        gates = self.training.gates
        return {"closed_gates": gates.closed / gates.units}
