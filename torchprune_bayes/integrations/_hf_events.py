"""Order and timing of a Trainer's callbacks, as needed here.

In plain words: the trackers of ``report_to`` come before the callbacks of the user and would log
before these have added their numbers; and the checkpoint of an epoch's last step is written before
the Trainer says that the epoch has ended.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, cast

from torchprune_bayes._extras import optional

with optional("transformers", "hf"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler


def records_of(state: TrainerState) -> dict[str, Any]:
    """What callbacks keep in the Trainer's checkpoints, by name; changes are kept."""
    # Annotated as the list of callbacks that is given, but a dictionary once training has begun.
    return cast("dict[str, Any]", state.stateful_callbacks)


class FirstToLog(TrainerCallback):
    """A callback whose metrics reach all others, trackers that ``report_to`` names included.

    When training begins it moves to the front of the Trainer's callbacks.
    """

    def numbers(self) -> dict[str, float]:
        """Metrics to add to every log."""
        return {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add the metrics to the log."""
        if logs is not None:
            numbers = self.numbers()
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def _move_to_front(self) -> None:
        handler = _calling_handler(self)
        if handler is not None:
            # A new list: the handler is iterating over the old one.
            handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]


class AtEpochEnds(TrainerCallback):
    """A callback with something to do once per epoch, before the checkpoint of its last step.

    So a run that resumes from that checkpoint is like one that was not interrupted.
    """

    _ended_at: int | None = None

    def end_epoch(self, state: TrainerState, control: TrainerControl) -> None:
        """Do it."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Do it if this was the last step of an epoch."""
        if state.epoch is not None and float(state.epoch).is_integer():
            self._ended_at = state.global_step
            self.end_epoch(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Do it if the epoch ended early, or was of a stream, whose end is unknown before."""
        if self._ended_at != state.global_step:
            self.end_epoch(state, control)


def _calling_handler(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that is calling ``callback``; transformers does not pass it to callbacks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and any(c is callback for c in handler.callbacks):
            return handler
        frame = frame.f_back
    return None
