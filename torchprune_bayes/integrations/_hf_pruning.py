"""Pruning while ``transformers.Trainer`` trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from torchprune_bayes._checks import check_choice
from torchprune_bayes._distributed import on_all_ranks
from torchprune_bayes._extras import optional
from torchprune_bayes.calibration import Calibration
from torchprune_bayes.errors import ArgumentTypeError, ParameterError
from torchprune_bayes.integrations._checkpoints import (
    MASK_FILE,
    check_frozen,
    check_zeros,
    record_of,
    save_pruner,
    state_from,
)
from torchprune_bayes.integrations._distributed_steps import step_on_all_ranks
from torchprune_bayes.integrations._hf_events import AtEpochEnds, FirstToLog, records_of
from torchprune_bayes.integrations._hf_metrics import TrainerMetrics
from torchprune_bayes.integrations._hf_resume import (
    RECORD,
    checkpoint_folder,
    follow_best,
    forget_best,
    masks_on_record,
    resume_folders,
    warn_of,
    zeros_at_start,
)
from torchprune_bayes.integrations._ranks import refuse_sharded
from torchprune_bayes.methods.global_pruning import unstructured_method
from torchprune_bayes.params import prunable_parameters, unwrap
from torchprune_bayes.schedules import Schedule
from torchprune_bayes.training import GradualPruner, bare_optimizer
from torchprune_bayes.types import Masks, ParameterPairs

with optional("transformers", "hf"):
    from transformers import TrainerControl, TrainerState, TrainingArguments

Schedules: TypeAlias = Schedule | Mapping[str, Schedule]
CalibrationFactory: TypeAlias = Callable[[nn.Module, ParameterPairs], Calibration]


class PruningCallback(FirstToLog, AtEpochEnds):
    """Prune a model while ``transformers.Trainer`` trains it, with any method and schedule.

    Zeros are the mask: weights remain plain, so checkpoints, ``from_pretrained`` and other
    callbacks see an ordinary model, and the zeros are kept through momentum, moment estimates and
    weight decay (:func:`~torchprune_bayes.keep_sparse`). Every checkpoint gets the masks as
    ``pruning_masks.safetensors`` and a fingerprint of them in ``trainer_state.json``. On resume the
    masks must be those of the checkpoint, or training stops with an error. If the file is missing,
    the zeros in the weights are used, and a difference from the record is reported.

    A model that already has zeros, pruned by another callback or loaded from a checkpoint,
    keeps them: they count as pruned from the start. Of a model with adapters (``peft``) the base is
    pruned, which its checkpoints do not contain: load the same one before resuming.

    Pruning that is due at the end of an epoch happens at the end of its last step, so that the
    checkpoint of that step includes it. The sparsity is logged, to the trackers of ``report_to``
    too.

    When something is pruned, the best metric so far is forgotten, so that
    ``load_best_model_at_end`` and early stopping compare models of one sparsity, and never restore
    the dense one.

    Args:
        method: A pruning method, ours or PyTorch's, or a registered name.
        schedule: A :class:`~torchprune_bayes.schedules.Schedule`; or one for each tensor, by
            qualified name; or a function that makes either from the number of steps (or epochs) of
            the training. Step 0 is before training, the last one after it.
        unit: What a schedule counts, ``"step"`` (updates) or ``"epoch"``.
        params: ``(module, name)`` pairs, or a function from the model to them; default
            :func:`~torchprune_bayes.prunable_parameters`.
        exclude: Names of modules to keep dense, such as ``["classifier"]``.
        calibration: A :class:`~torchprune_bayes.Calibration` of the model in training, or a
            function ``(model, params) -> Calibration`` such as the result of :func:`calibrate_on`.
        forget_best: Whether the best metric is forgotten when something is pruned.
        keep_zeros: Whether exact zeros that the weights have at the start count as pruned.
        options: Further arguments of :class:`~torchprune_bayes.GradualPruner`, such as
            ``decay_after=False``, and of the method.

    Attributes:
        pruner: The :class:`~torchprune_bayes.GradualPruner` at work; ``None`` before training.

    Raises:
        ArgumentError: If ``unit`` is unknown or an option has an impossible value.
        ArgumentTypeError: If a method needs calibration and none is given.
        ParameterError: When training begins: if weights are sharded (ZeRO-3, FSDP).
        AlignmentError: On resume: if masks and weights are of different checkpoints.

    Cost: that of :class:`~torchprune_bayes.GradualPruner`.

    Example:
        >>> from torchprune_bayes import one_shot
        >>> at_the_end = PruningCallback("magnitude", lambda steps: one_shot(0.5, at=steps))
        >>> at_the_end.sparsity
        0.0
    """

    def __init__(
        self,
        method: type[BasePruningMethod] | str,
        schedule: Schedules | Callable[[int], Schedules],
        *,
        unit: str = "step",
        params: ParameterPairs | Callable[[nn.Module], ParameterPairs] | None = None,
        exclude: Sequence[str] = (),
        calibration: Calibration | CalibrationFactory | None = None,
        forget_best: bool = True,
        keep_zeros: bool = True,
        **options: Any,
    ) -> None:
        check_choice("unit", unit, ("step", "epoch"))
        kind = unstructured_method(method)
        if calibration is None and getattr(kind, "needs_calibration", False):
            raise ArgumentTypeError(
                f"Expected `calibration` for {kind.__name__}, such as "
                "calibrate_on(dataset, num_samples=512), got none."
            )
        self.unit = unit
        self.forget_best, self.keep_zeros = forget_best, keep_zeros
        self.pruner: GradualPruner | None = None
        self._method = kind
        self._schedule = schedule
        self._params = list(params) if params is not None and not callable(params) else params
        self._exclude = exclude
        self._calibration = calibration
        self._options = options
        self._optimizer: Any = None
        self._record: dict[str, Any] = {}

    @property
    def sparsity(self) -> float:
        """Share of the entries that are pruned, over all tensors that the callback prunes."""
        return float(self._record.get("sparsity", 0.0))

    def metrics(self, *, causal: bool = False) -> TrainerMetrics:
        """A ``compute_metrics`` for the Trainer: accuracy, NLL, ECE, Brier score and sparsity.

        Args:
            causal: Whether logits predict the next token, as those of causal language models.
        """
        return TrainerMetrics(causal=causal, extra=lambda: {"sparsity": self.sparsity})

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
        """Make the pruner, load its masks from a checkpoint, and prune if that is due."""
        pruner_state = on_all_ranks(lambda: self._begin(args, state, unwrap(model), optimizer))
        assert self.pruner is not None
        on_all_ranks(lambda: cast(GradualPruner, self.pruner).load_state_dict(pruner_state))
        self._record = record_of(self.pruner)
        if not state.global_step:
            self._advance(state)
        self._move_to_front()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Prune if it is due after this update; the optimizer's hook has kept the zeros."""
        if self.unit == "step":
            self._advance(state)
        super().on_step_end(args, state, control)

    def end_epoch(self, state: TrainerState, control: TrainerControl) -> None:
        """Prune if it is due after this epoch."""
        if self.unit == "epoch":
            self._advance(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write the masks into the folder of the checkpoint."""
        if self.pruner is not None:
            on_all_ranks(lambda: self._save(args, state))

    def numbers(self) -> dict[str, float]:
        """The sparsity."""
        return {} if self.pruner is None else {"sparsity": self.sparsity}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Check that masks and weights are of one checkpoint, also if the best was loaded.

        Zeros are kept only until then; :func:`~torchprune_bayes.keep_sparse` keeps them in
        other training.
        """
        if self.pruner is None:
            return
        on_all_ranks(lambda: self._end(args, state))
        if not self.pruner.finished:
            warn_of(
                f"Training ended before its schedule did, at a sparsity of {self.sparsity:.4f}."
            )

    def _begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any
    ) -> dict[str, Any]:
        """Make the pruner; returns the state to start from."""
        if getattr(args, "deepspeed", None):
            raise ParameterError(
                "Expected no DeepSpeed, whose optimizer keeps its own copy of the weights."
            )
        refuse_sharded(model)
        self._optimizer = bare_optimizer(optimizer)
        earlier, self.pruner = self.pruner, self._new_pruner(model, args, state)
        if state.global_step:
            pruner_state = self._resumed(args, state)
        else:
            pruner_state = {"step": 0, "history": [], "masks": self._masks_at_start(earlier)}
        if earlier is not None:
            earlier.remove()
        return pruner_state

    def _save(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = checkpoint_folder(args, state)
        if self.pruner is not None and args.should_save and folder.is_dir():
            save_pruner(self.pruner, folder / MASK_FILE)

    def _end(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.pruner is not None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            follow_best(self.pruner, Path(state.best_model_checkpoint))
            self._record = record_of(self.pruner)
        check_zeros(self.pruner.space, self.pruner.state_dict()["masks"])
        self.pruner.remove()

    def _new_pruner(
        self, model: nn.Module, args: TrainingArguments, state: TrainerState
    ) -> GradualPruner:
        params = self._params(model) if callable(self._params) else self._params
        pairs = prunable_parameters(model, exclude=self._exclude) if params is None else params
        calibration = self._calibration
        if callable(calibration):
            calibration = calibration(model, pairs)
        if calibration is None:  # without data; it provides the tensors' names
            calibration = Calibration(model, [], params=pairs)
        total = state.max_steps if self.unit == "step" else state.num_train_epochs
        schedule: Any = self._schedule
        if callable(schedule) and not isinstance(schedule, Schedule):
            schedule = schedule(total)
        return GradualPruner(
            pairs,
            self._method,
            _one_later(schedule),
            calibration=calibration,
            optimizer=self._optimizer,
            **self._options,
        )

    def _advance(self, state: TrainerState) -> None:
        assert self.pruner is not None
        event = step_on_all_ranks(self.pruner)
        self._record["step"] += 1
        if event is not None:
            self._record = record_of(self.pruner)
            if self.forget_best:
                forget_best(state)
        records_of(state)[RECORD] = self._record

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        assert self.pruner is not None
        record = records_of(state).get(RECORD)
        if record is None:
            done = state.global_step if self.unit == "step" else int(state.epoch)
            warn_of("The checkpoint was not made with this callback: pruning starts from dense.")
            return {"step": done + 1, "history": [], "masks": {}}
        masks = masks_on_record(self.pruner.space, record, resume_folders(args, state))
        trained = {t.name for t in self.pruner.space.subset(masks) if t.leaf.requires_grad}
        check_zeros(self.pruner.space, {name: masks[name] for name in trained})
        check_frozen(self.pruner.space, masks, record)
        return state_from(record, masks)

    def _masks_at_start(self, earlier: GradualPruner | None) -> Masks:
        """Masks of this callback's last training of the same model, or of its zeros."""
        assert self.pruner is not None
        if earlier is not None and earlier.space.model is self.pruner.space.model:
            return dict(earlier.state_dict()["masks"])
        return zeros_at_start(self.pruner.space) if self.keep_zeros else {}


def _one_later(schedule: Any) -> Any:
    # A pruner's first step comes after an update; here it comes before the first one.
    if isinstance(schedule, Mapping):
        return {name: _one_later(value) for name, value in schedule.items()}
    if not isinstance(schedule, Schedule):
        return schedule
    end = None if schedule.end is None else schedule.end + 1
    return replace(schedule, begin=schedule.begin + 1, end=end)
