"""Forward passes without activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint


class _CalledAtOnce:
    """Replacement of ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    """Replacement of torch's code before and after a checkpointed function."""
    yield


_STAND_INS = {
    "CheckpointFunction": _CalledAtOnce,
    "_checkpoint_without_reentrant_generator": _nothing_around,
    "_checkpoint_without_reentrant_generator_impl": _nothing_around,
}


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Make ``torch.utils.checkpoint`` call functions directly.

    A checkpoint recomputes its part of the model in the backward pass. By then the weights
    of a functional call are removed, and the part is recomputed with the model's own: the
    gradients are those of other weights, or none at all where the checkpoint is reentrant.
    """
    held = {name: vars(checkpoint)[name] for name in _STAND_INS if hasattr(checkpoint, name)}
    for name in held:
        setattr(checkpoint, name, _STAND_INS[name])
    try:
        yield
    finally:
        for name, original in held.items():
            setattr(checkpoint, name, original)
