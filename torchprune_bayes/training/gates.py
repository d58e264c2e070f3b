"""Learning which units a network needs, in any training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchprune_bayes._checks import check_choice, check_count, check_keys, check_positive
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.gates import Criterion, Gates, find_criterion, gates_of
from torchprune_bayes.training._pruner_state import check_history
from torchprune_bayes.training.undo import tensors_kept_on_error

logger = logging.getLogger("torchprune_bayes")

KL_SCALES = ("elbo", "mean", "sum")
_STATE = {"step", "epoch", "finetuning", "history", "best"}


class GateTraining:
    """Train a model with gates: the penalty, its annealing, and when gates close.

    Add :meth:`penalty` to the mean loss of a batch, call :meth:`step` after ``optimizer.step()``,
    :meth:`end_epoch` after each epoch, and :meth:`begin_finetuning` once, before the last epochs.
    This is the algorithm of arXiv:2406.01345 with a choice of the scale of its objective.

    Args:
        model: A model with gates, wrapped in DDP or not.
        data_size: Number of training samples, for ``kl="elbo"``.
        kl: What the KL divergences of all gates are multiplied by. ``"elbo"``: 1/``data_size``,
            the negative evidence lower bound per sample. ``"mean"``: the mean over sites of the
            mean over units, as in the paper's code, which weights narrow layers most and is not a
            bound. ``"sum"``: 1. A number: that number.
        anneal_steps: Steps over which the penalty grows linearly from zero.
        criterion: A criterion or its name, see :func:`~torchprune_bayes.gates.find_criterion`.
        prune_every: Epochs between two prunings while training; ``None`` prunes only before
            fine-tuning.
        amount: Cap on what one pruning closes; see :func:`~torchprune_bayes.gates.choose_closed`.
        beyond: Close ``amount`` even where the criterion is against it.
        keep: Gates that stay open at each site.
        regrow: Whether a pruning may reopen gates, as in the paper's code.

    Attributes:
        history: A dict of plain values for each epoch: ``epoch``, ``closed`` (gates in all),
            ``pruned`` (at its end) and ``metric``.

    Raises:
        ArgumentError: If an argument has an impossible value or the model has no gates.
        ArgumentTypeError: If ``data_size`` is missing.

    Cost: per step a few evaluations of log Φ for each gate; the best checkpoint is a copy of the
    model on the CPU.

    Example:
        >>> import torch
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> _ = attach_gates(model)
        >>> training = GateTraining(model, data_size=32, prune_every=None)
        >>> optimizer = torch.optim.Adam(gate_parameter_groups(model, lr=1e-3))
        >>> x = torch.randn(32, 4)
        >>> loss = model(x).square().mean() + training.penalty()
        >>> loss.backward()
        >>> optimizer.step()
        >>> training.step()
        >>> training.end_epoch(metric=0.5)["closed"]
        0
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data_size: int | None = None,
        kl: str | float = "elbo",
        anneal_steps: int = 0,
        criterion: Criterion | str = "bmrs-n",
        prune_every: int | None = 1,
        amount: float | int | None = None,
        beyond: bool = False,
        keep: int = 1,
        regrow: bool = False,
    ) -> None:
        _check_scale(kl, data_size)
        check_count("anneal_steps", anneal_steps, minimum=0)
        if prune_every is not None:
            check_count("prune_every", prune_every)
        self.gates: Gates = gates_of(model)
        self.kl, self.data_size, self.anneal_steps = kl, data_size, anneal_steps
        self.criterion = find_criterion(criterion)
        self.prune_every = prune_every
        self.finetuning = False
        self.history: list[dict[str, Any]] = []
        self._options = {"amount": amount, "beyond": beyond, "keep": keep, "regrow": regrow}
        self._step = 0
        self._best: tuple[float, dict[str, Tensor]] | None = None

    @property
    def best_metric(self) -> float | None:
        """The largest metric of the present phase, if there is one."""
        return None if self._best is None else self._best[0]

    def penalty(self) -> Tensor:
        """The scaled and annealed KL term, a float32 scalar to add to the mean loss of a batch."""
        share = min(1.0, (self._step + 1) / self.anneal_steps) if self.anneal_steps else 1.0
        return (share * self._scaled_kl()).float()

    def step(self) -> None:
        """Count a step and move the gates' parameters back into their bounds."""
        self.gates.project_()
        self._step += 1

    def end_epoch(self, metric: float | None = None) -> dict[str, Any]:
        """Prune if it is due, and keep a copy of the model if it is the best of this phase.

        Args:
            metric: Larger is better, measured on the model as it is now; with
                several processes it must be the same on all of them, or they would restore
                different models.

        Returns:
            What was added to :attr:`history`.
        """
        epoch = len(self.history) + 1
        if metric is not None and (self._best is None or metric > self._best[0]):
            self._best = (float(metric), _copied(self.gates.model))
        due = self.prune_every is not None and epoch % self.prune_every == 0
        pruned = self._prune() if due and not self.finetuning else 0
        event = {
            "epoch": epoch,
            "step": self._step,
            "closed": self.gates.closed,
            "pruned": pruned,
            "metric": metric,
        }
        self.history.append(event)
        return event

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Restore gates and counters if the body, which may close gates, fails."""
        ours = {key: vars(self)[key] for key in ("_step", "finetuning", "history", "_best")}
        ours["history"] = list(self.history)
        gates = list(self.gates.values())
        tensors = [t for gate in gates for t in (*gate.parameters(), *gate.buffers())]
        with tensors_kept_on_error([(tensor, None) for tensor in tensors]):
            try:
                yield
            except BaseException:
                vars(self).update(ours)
                raise

    def begin_finetuning(self) -> int:
        """Prune for the last time, fix the masks, and start tracking the best model again.

        With ``amount``, a cap per pruning, a pruning at the end of the epoch before
        was the last one: a second without a step in between would close as many again.

        Returns:
            How many gates this pruning has closed.
        """
        last = self.history[-1] if self.history else {"pruned": 0}
        capped = self._options["amount"] is not None and last["pruned"]
        pruned = 0 if capped and last["step"] == self._step else self._prune()
        self.finetuning = True
        self._best = None
        return pruned

    def restore_best(self) -> float:
        """Load the best model of this phase.

        Returns:
            Its metric.

        Raises:
            ArgumentError: If no metric was given in this phase.
        """
        if self._best is None:
            raise ArgumentError("Expected a metric in end_epoch before restore_best, got none.")
        self.gates.model.load_state_dict(self._best[1])
        return self._best[0]

    def state_dict(self) -> dict[str, Any]:
        """Counters, history and the best checkpoint; ``torch.load`` reads it safely."""
        return {
            "step": self._step,
            "epoch": len(self.history),
            "finetuning": self.finetuning,
            "history": [dict(event) for event in self.history],
            "best": None if self._best is None else list(self._best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`; the model loads its own state.

        Raises:
            ArgumentError: If ``state`` is not a state of this class.
        """
        check_keys("a gate training's state", state, _STATE)
        check_count("step", state["step"], minimum=0)
        check_history(state["history"])
        best = state["best"]
        if best is not None and not (len(best) == 2 and isinstance(best[1], Mapping)):
            raise ArgumentError(f"Expected a metric and a model as best, got {best!r:.80}.")
        self._best = None if best is None else (float(best[0]), dict(best[1]))
        self.history = [dict(event) for event in state["history"]]
        self.finetuning, self._step = bool(state["finetuning"]), int(state["step"])

    def _scaled_kl(self) -> Tensor:
        if self.kl == "mean":
            return self.gates.mean_kl()
        if self.kl == "elbo":
            assert self.data_size is not None
            return self.gates.kl() / self.data_size
        return self.gates.kl() * (1.0 if isinstance(self.kl, str) else self.kl)

    def _prune(self) -> int:
        pruned = self.gates.prune(self.criterion, **self._options)  # type: ignore[arg-type]
        logger.info("Closed %d gates, %d of %d.", pruned, self.gates.closed, self.gates.units)
        return pruned


def gate_parameter_groups(
    model: nn.Module, lr: float, *, multiplier: float = 10.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: gates learn faster and never decay.

    With Adam, log σ moves by about the learning rate in a step, so that it takes about
    7.5/(``lr`` · ``multiplier``) steps from its initial value, -5, to where gates close.

    Args:
        model: A model with gates, wrapped in DDP or not.
        lr: Learning rate of the weights.
        multiplier: Learning rate of the gates, in units of ``lr``.
        weight_decay: Weight decay of the weights.

    Returns:
        Two groups, weights first.

    Raises:
        ArgumentError: If a rate is not positive or the model has no gates.
        ArgumentTypeError: If a rate is no number.

    Example:
        >>> from torchprune_bayes.gates import attach_gates
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> _ = attach_gates(model)
        >>> [(len(group["params"]), group["lr"]) for group in gate_parameter_groups(model, 1e-3)]
        [(4, 0.001), (2, 0.01)]
    """
    check_positive("lr", lr)
    check_positive("multiplier", multiplier)
    gates = gates_of(model).parameters()
    ids = {id(parameter) for parameter in gates}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": gates, "lr": lr * multiplier, "weight_decay": 0.0},
    ]


def _check_scale(kl: str | float, data_size: int | None) -> None:
    if isinstance(kl, str):
        check_choice("kl", kl, KL_SCALES)
    else:
        check_positive("kl", kl)
    if kl == "elbo":
        if data_size is None:
            raise ArgumentTypeError("Expected `data_size` for kl='elbo', got none.")
        check_count("data_size", data_size)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
