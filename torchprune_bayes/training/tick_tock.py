"""Gate decorators end to end: tick, tock, and removal of the closed channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_count, check_fraction, check_positive
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.params import unwrap
from torchprune_bayes.structured import ShrinkReport, shrink
from torchprune_bayes.training.gate_decorators import (
    GateDecorator,
    close_gates,
    collect_scores,
    decorate_norms,
    fold_gates,
    gate_penalty,
)

Phase = Literal["tick", "tock", "done"]
_FIRST = 0.01  # of the gates, closed after the first epoch, as in the SNIP-it paper's code


class TickTock:
    """Train a network with gates behind its batch norms, and close them, alternately.

    `Gate Decorator (You et al., 2019) <https://arxiv.org/abs/1909.08174>`_. In a *tick* only the
    gates learn, and after each epoch those whose closing would change the loss least are closed; in
    a *tock* all weights learn, with ``penalty`` on the gates. Ticks and tocks alternate
    until as many gates are closed as requested. Then :meth:`cut` removes the gates and the closed
    channels, and the network is fine-tuned like any other::

        tick_tock = TickTock(model, 0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        while tick_tock.phase != "done":
            with tick_tock.epoch():
                for inputs, targets in loader:
                    loss = loss_fn(model(inputs), targets) + tick_tock.penalty()
                    ...                      # zero_grad, backward, optimizer.step(), as ever
        tick_tock.cut(inputs)                # afterwards make a new optimizer

    Args:
        model: A trained model with batch norms; gates are put behind all of them, in place.
        sparsity: Fraction of the gates to close in the end.
        increment: Fraction of the gates that each epoch of a tick closes; the first closes 1 %.
        tick: Epochs of a tick.
        tock: Epochs of a tock.
        strength: Factor of the penalty.
        min_open: Gates to keep open in each norm as far as the count allows.

    Attributes:
        gates: The gates.
        history: A dict of plain values for each epoch: ``phase`` and ``closed``, a fraction.

    Raises:
        ArgumentError: If an argument is out of range or the model has no batch norm.

    Cost: one product more per activation of a norm.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        >>> _ = model.append(nn.Linear(32, 2))
        >>> tick_tock = TickTock(model, 0.5, increment=0.25, tick=2, tock=1)
        >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(6, 1, 4, 4)
        >>> while tick_tock.phase != "done":
        ...     with tick_tock.epoch():
        ...         optimizer.zero_grad()
        ...         (model(x).square().sum() + tick_tock.penalty()).backward()
        ...         optimizer.step()
        >>> [event["phase"] for event in tick_tock.history]
        ['tick', 'tick', 'tock', 'tick']
        >>> report = tick_tock.cut(x)
        >>> model[0].out_channels
        4
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        increment: float = 0.05,
        tick: int = 10,
        tock: int = 10,
        strength: float = 1e-3,
        min_open: int = 1,
    ) -> None:
        check_fraction("sparsity", sparsity, closed=False)
        check_positive("increment", increment)
        check_fraction("increment", increment)
        check_count("tick", tick)
        check_count("tock", tock)
        check_positive("strength", strength)
        self._model, self._sparsity, self._increment = unwrap(model), sparsity, increment
        self._lengths = {"tick": tick, "tock": tock}
        self._strength, self._min_open = strength, min_open
        self.gates: Sequence[GateDecorator] = decorate_norms(self._model)
        self.history: list[dict[str, Any]] = []
        self.phase: Phase = "tick"
        self._epochs = 0  # of the phase

    @property
    def closed(self) -> float:
        """Fraction of the gates that are closed."""
        masks = [gate.open for gate in self.gates]
        return 1.0 - sum(int(mask.sum()) for mask in masks) / sum(m.numel() for m in masks)

    def penalty(self) -> Tensor:
        """What to add to the loss of a batch: zero in a tick."""
        if self.phase == "tock":
            return self._strength * gate_penalty(self.gates)
        return torch.zeros((), device=self.gates[0].gate.device)

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """One epoch of training in the body; afterwards gates are closed, if it was a tick's.

        If the body fails, no gate is closed and the epoch is not counted.

        Raises:
            ArgumentError: If the last phase is over.
        """
        if self.phase == "done":
            raise ArgumentError("Expected an epoch of a tick or a tock, got one after the last.")
        if self.phase == "tock":
            yield
        else:
            with _gates_alone(self._model, self.gates), collect_scores(self.gates):
                yield
            self._close()
        self._epochs += 1
        self.history.append({"phase": self.phase, "closed": self.closed})
        self._turn()

    def cut(self, example_inputs: Any, **options: Any) -> ShrinkReport:
        """Fold the gates into the norms and remove the closed channels from the model.

        Args:
            example_inputs: See :func:`~torchprune_bayes.structured.shrink`.
            options: Further arguments of that function, such as ``ignored``.
        """
        from torchprune_bayes.structured import LargestWeightImportance  # loads torch-pruning

        fold_gates(self._model)
        self.phase = "done"
        importance = LargestWeightImportance("norm", threshold=1e-12)
        return shrink(self._model, example_inputs, importance, target="evidence", **options)

    def _close(self) -> None:
        epochs = sum(event["phase"] == "tick" for event in self.history)
        target = min(_FIRST + epochs * self._increment, self._sparsity)
        sizes = [gate.open.numel() for gate in self.gates]
        missing = round(target * sum(sizes)) - round(self.closed * sum(sizes))
        room = sum(max(int(gate.open.sum()) - self._min_open, 0) for gate in self.gates)
        close_gates(self.gates, min(max(missing, 0), room), min_open=self._min_open)

    def _turn(self) -> None:
        """Enter the next phase if it is due."""
        ticks = sum(event["phase"] == "tick" for event in self.history)
        if _FIRST + (ticks - 1) * self._increment >= self._sparsity:
            self.phase = "done"
        elif self._epochs >= self._lengths[self.phase]:
            self.phase, self._epochs = ("tock" if self.phase == "tick" else "tick"), 0


@contextmanager
def _gates_alone(model: nn.Module, gates: Sequence[GateDecorator]) -> Iterator[None]:
    """Compute gradients of the gates only."""
    learning = {id(gate.gate) for gate in gates}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in learning]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
