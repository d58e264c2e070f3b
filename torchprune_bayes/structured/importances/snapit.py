"""SNAP-it: units by the elasticity of the loss to a gate on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchprune_bayes._checks import check_choice
from torchprune_bayes._numerics.precision import wide
from torchprune_bayes.calibration import Calibration, batch_size
from torchprune_bayes.errors import ArgumentError, ParameterError
from torchprune_bayes.methods.sensitivity import BATCH_NORMS, mean_loss, normalising_by
from torchprune_bayes.schedules import halving
from torchprune_bayes.structured.groups import UnitGroup, UnitSlice
from torchprune_bayes.structured.importances._calibrated import (
    CalibratedImportance,
    gate_pieces,
    pieces_of,
)
from torchprune_bayes.structured.importances._gates import Gates

EPSILON = 1e-8
"""The published code's, against a loss of zero."""


class SNAPitImportance(CalibratedImportance):
    """Elasticity ``|∂L/∂c · c/L|`` of the loss to a gate ``c = 1`` on each unit.

    The structured half of `SNIP-it (Verdenius, Stol and Forré, 2020)
    <https://arxiv.org/abs/2006.00896>`_. A gate on all that reads a unit changes the loss by
    ``Σ w ∂L/∂w`` over the columns that belong to it, whatever lies before them: norms, additions,
    attention, activations. The sum is signed and runs over all readers before the absolute value is
    taken. It is the first-order change of the loss for exactly what shrinking removes, so it is the
    default. Units that nothing reads, the outputs of a model, have no score.

    The paper shrinks in steps, each with new gradients:
    ``shrink(..., sparsity=0.93, steps=halving_path(0.93), target="channels")``.

    Args:
        calibration: Data, model and loss. The paper takes 2560 samples.
        gate: Where the gate stands. ``"consumer"``: on what reads the unit. ``"producer"``, as in
            the paper: on the output of the layer that makes it, bias included and before a norm,
            ``Σ w ∂L/∂w + b ∂L/∂b`` over its rows; heads are gated where they are read, because
            their queries and keys are no output. ``"activation"``: on the values that are read, by
            hooks on the readers, which is the same number as ``"consumer"`` by another way.
        batch_norm: What batch norms normalise by while scoring. ``"running"``, as in the paper:
            their running statistics, which before training are mean 0 and variance 1, so that
            nothing is normalised. ``"batch"``: each batch of the data, as in training; gates of
            producers would come to nothing then and are refused.

    Raises:
        ArgumentError: If an option is none of these, or producers are gated before norms by the
            batch.
        ArgumentTypeError: If there is no calibration.

    Cost: one gradient of the mean loss and one evaluation of it; one copy of the weights.

    Example:
        >>> from torchprune_bayes.structured import find_groups
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     model[2].weight[:, 1] = 0.0
        >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
        >>> calibration = Calibration(model, data, nn.functional.cross_entropy)
        >>> [group] = find_groups(model, torch.zeros(1, 4))
        >>> SNAPitImportance(calibration).score(group, model) > 0
        tensor([ True, False,  True])
    """

    def __init__(
        self, calibration: Calibration, gate: str = "consumer", batch_norm: str = "running"
    ) -> None:
        super().__init__(calibration)
        check_choice("gate", gate, ("consumer", "producer", "activation"))
        check_choice("batch_norm", batch_norm, BATCH_NORMS)
        if gate == "producer" and batch_norm == "batch":
            raise ArgumentError(
                "Expected gate='consumer' or 'activation' for batch_norm='batch', which undoes a "
                "gate before a norm, got gate='producer'."
            )
        self.gate, self.joint = gate, gate != "producer"
        self.batch_norm = batch_norm

    def measure(self, calibration: Calibration, groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
        """The elasticities.

        Raises:
            ParameterError: If a reader is not called with the gate on activations.
        """
        of_gates = _by_hooks if self.gate == "activation" else self._by_weights
        with normalising_by(self.batch_norm, calibration.model):
            changes = of_gates(calibration, groups)
            unit = abs(mean_loss(calibration, {}) + EPSILON)
        return {name: change.abs() / unit for name, change in changes.items()}

    def _by_weights(
        self, calibration: Calibration, groups: Sequence[UnitGroup]
    ) -> dict[str, Tensor]:
        """``Σ w ∂L/∂w`` over what carries the gate, by group."""
        gated = {group.name: self._gated(group) for group in groups if self._gated(group)}
        return Gates(calibration, gated).mean() if gated else {}

    def _gated(self, group: UnitGroup) -> list[tuple[UnitSlice, float]]:
        in_heads = group.kind in ("head", "dimension")
        return gate_pieces(group, "consumer" if in_heads else self.gate)

    def _measured(self, group: UnitGroup) -> bool:
        return bool(pieces_of(group, "consumer") or (group.unread and self.gate != "activation"))


def halving_path(final: float, steps: int = 5, start: float = 0.5) -> list[float]:
    """List the sparsities after each of the paper's steps, for ``shrink(..., steps=...)``.

    Args:
        final: Sparsity at last, ``κ``.
        steps: ``S``, how often what is missing is halved.
        start: Sparsity after the first step.

    Returns:
        ``κ − (κ − start)·2^{−i}`` for ``i = 0, ..., S``, and ``κ``; ``κ`` alone if it is at most
        ``start``.

    Raises:
        ArgumentError: If an argument is out of range.
        ArgumentTypeError: If an argument has the wrong type.

    Example:
        >>> [round(sparsity, 3) for sparsity in halving_path(0.98)]
        [0.5, 0.74, 0.86, 0.92, 0.95, 0.965, 0.98]
        >>> halving_path(0.3)
        [0.3]
    """
    schedule = halving(final, steps=steps, initial=start)
    return [schedule(step) for step in schedule.steps()]


def _by_hooks(calibration: Calibration, groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
    """Gradients of gates that multiply what the readers are given."""
    model, place = calibration.model, {"dtype": calibration.dtype, "device": calibration.device}
    gates = {
        group.name: torch.ones(group.units, **place, requires_grad=True)  # type: ignore[call-overload]
        for group in groups
    }
    total = {name: wide(torch.zeros_like(gate)) for name, gate in gates.items()}
    with _gated_readers(model, groups, gates) as called:
        for batch in calibration.batches():
            with torch.enable_grad():
                loss = calibration.loss(None, batch)
                if not loss.requires_grad:  # no reader was called
                    continue
                result = torch.autograd.grad(loss, [*gates.values()], materialize_grads=True)
            for name, gradient in zip(gates, result, strict=True):
                total[name] += wide(gradient) * (batch_size(batch) / calibration.num_samples)
    readers = [piece.name for group in groups for piece in pieces_of(group, "consumer")]
    if idle := [name for name in readers if name not in called]:
        raise ParameterError(
            f"Expected the layer of `{idle[0]}` to be called on a tensor, got no such call, so "
            "that no gate can stand there: use gate='consumer'."
        )
    return total


@contextmanager
def _gated_readers(
    model: nn.Module, groups: Sequence[UnitGroup], gates: dict[str, Tensor]
) -> Iterator[set[str]]:
    """Hooks on all readers; yields the names of those that were called so far."""
    called: set[str] = set()
    with ExitStack() as stack:
        for group in groups:
            for piece in pieces_of(group, "consumer"):
                module = model.get_submodule(piece.name.rpartition(".")[0])
                hook = _gating(piece, gates[group.name], called)
                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield called


def _gating(piece: UnitSlice, gate: Tensor, called: set[str]) -> Any:
    def multiply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        called.add(piece.name)
        inputs: Tensor = args[0]
        spatial = cast(Tensor, module.weight).dim() - 2
        dim = inputs.dim() - spatial - 1
        positions = piece.positions.to(gate.device)
        factor = torch.ones(inputs.shape[dim], dtype=gate.dtype, device=gate.device)
        factor = factor.index_copy(
            0, positions.flatten(), gate.repeat_interleave(positions.shape[1])
        )
        return (inputs * factor.view(-1, *[1] * spatial), *args[1:])

    return multiply
