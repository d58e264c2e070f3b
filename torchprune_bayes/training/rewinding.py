"""Iterative magnitude pruning with rewinding, in any training loop."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_bayes._checks import check_choice, check_keys
from torchprune_bayes.errors import AlignmentError, ArgumentError
from torchprune_bayes.params import ParameterSpace, unwrap
from torchprune_bayes.schedules import Schedule
from torchprune_bayes.training._optimizers import bare_optimizer, moments_of
from torchprune_bayes.training.gradual import GradualPruner
from torchprune_bayes.training.keep_sparse import set_zero
from torchprune_bayes.training.undo import state_kept_on_error, tensors_kept_on_error
from torchprune_bayes.types import Masks, ParameterPairs

REWOUND = ("all", "weights")


class IterativeMagnitudePruning:
    """Train, prune the smallest weights, rewind the others to early values, and train again.

    `Frankle and Carbin (2019) <https://arxiv.org/abs/1803.03635>`_ rewind to the initial weights,
    `Frankle et al. (2020) <https://arxiv.org/abs/1912.05671>`_ to those after a little training,
    where larger networks find their sparse solutions too. Call :meth:`remember` at that point, and
    :meth:`prune_and_rewind` at the end of every round of training. Pruned weights are kept at zero
    while the optimizer updates the rest. The loop resets a learning-rate scheduler itself.

    Args:
        model: The model; its weights remain plain, without hooks.
        schedule: Sparsity after each round, the rounds counted from 1:
            ``geometric(0.9, begin=0, end=5)`` prunes the same share of what is left in 5 rounds.
        params: ``(module, name)`` pairs; ``None`` takes
            :func:`~torchprune_bayes.prunable_parameters`.
        optimizer: Its state is remembered, rewound, and kept at zero where weights are pruned.
        scope: ``"global"`` ranks all tensors jointly, ``"layer"`` each separately.
        rewind: ``"all"`` rewinds every parameter and buffer and the optimizer, with its learning
            rates; ``"weights"`` only the pruned tensors.

    Raises:
        AlignmentError: If a tensor is not in the optimizer.
        ArgumentError: If an argument has an impossible value.
        ArgumentTypeError: If the optimizer takes no hooks.
        ParameterError: If a tensor cannot be pruned.

    Cost: a copy of the model and of the optimizer's state; each round as magnitude pruning.

    Example:
        >>> from torchprune_bayes.schedules import geometric
        >>> model = nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = IterativeMagnitudePruning(
        ...     model, geometric(0.75, begin=0, end=2), optimizer=optimizer
        ... )
        >>> pruner.remember()
        >>> first = model.weight.detach().clone()
        >>> while not pruner.finished:
        ...     for _ in range(3):
        ...         model(torch.randn(8, 4)).square().sum().backward()
        ...         optimizer.step()
        ...     _ = pruner.prune_and_rewind()
        >>> pruner.sparsity, torch.equal(model.weight, first * pruner.masks["weight"])
        (0.75, True)
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        params: ParameterPairs | None = None,
        optimizer: Optimizer | None = None,
        scope: str = "global",
        rewind: str = "all",
    ) -> None:
        check_choice("rewind", rewind, REWOUND)
        self._model = unwrap(model)
        self._space = ParameterSpace(model, params)
        self._pruner = GradualPruner(
            self._space.pairs(), "magnitude", schedule, optimizer=optimizer, scope=scope
        )
        self._optimizer = None if optimizer is None else bare_optimizer(optimizer)
        self._rewind_all = rewind == "all"
        self._remembered: dict[str, Any] | None = None

    @property
    def masks(self) -> Masks:
        """Boolean masks by qualified name, as they are now."""
        return dict(zip(self._space.names, self._pruner.masks.values(), strict=True))

    @property
    def sparsity(self) -> float:
        """Share of the entries that are pruned, over all tensors."""
        return self._pruner.sparsity

    @property
    def finished(self) -> bool:
        """Whether the final sparsity is reached."""
        return self._pruner.finished

    @property
    def history(self) -> list[dict[str, Any]]:
        """A dict of plain values for each pruning, with the number of the round as ``step``."""
        return self._pruner.history

    def remember(self) -> None:
        """Store the present state, to which later rounds rewind."""
        state: dict[str, Any] = {"model": _cloned(self._rewound_tensors())}
        if self._optimizer is not None and self._rewind_all:
            state["optimizer"] = copy.deepcopy(self._optimizer.state_dict())
        self._remembered = state

    def prune_and_rewind(self) -> dict[str, Any] | None:
        """End a round: prune by the weights as they are now, then rewind the remaining ones.

        Returns:
            What was added to :attr:`history`, or ``None`` if the round pruned nothing; weights are
            rewound in any case.

        Raises:
            ArgumentError: If nothing was remembered. If anything fails, nothing is changed.
        """
        if self._remembered is None:
            raise ArgumentError(
                "Expected a call of remember() before prune_and_rewind(), got none."
            )
        rewound = [(tensor, None) for tensor in self._rewound_tensors().values()]
        planned = self._pruner.plan()
        with (
            self._pruner.applied(planned) as event,
            tensors_kept_on_error(rewound),
            state_kept_on_error(self._optimizer),
        ):
            self._rewind(self._remembered)
        return event

    def state_dict(self) -> dict[str, Any]:
        """Rounds, masks and what was remembered; ``torch.load`` reads it safely."""
        return {"pruner": self._pruner.state_dict(), "remembered": self._remembered}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`.

        Raises:
            AlignmentError: If the state belongs to another model.
            ArgumentError: If ``state`` is not a state of such a pruner.
        """
        check_keys("a rewinding pruner's state", state, {"pruner", "remembered"})
        remembered = state["remembered"]
        if remembered is not None:
            _check_same_shapes(self._rewound_tensors(), remembered["model"])
        self._pruner.load_state_dict(state["pruner"])
        self._remembered = copy.deepcopy(remembered)

    def _rewound_tensors(self) -> dict[str, Tensor]:
        if not self._rewind_all:
            return {tensor.name: tensor.leaf for tensor in self._space}
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    @torch.no_grad()
    def _rewind(self, state: Mapping[str, Any]) -> None:
        tensors = self._rewound_tensors()
        for name, saved in state["model"].items():
            tensors[name].copy_(saved)
        if self._optimizer is not None and "optimizer" in state:
            self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        masks = self.masks
        for tensor in self._space:
            moments = [] if self._optimizer is None else moments_of(self._optimizer, tensor.leaf)
            for value in (tensor.leaf, *moments):
                set_zero(value, ~masks[tensor.name])


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _check_same_shapes(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if ours != theirs:
        wrong = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        raise AlignmentError(
            f"Expected a state of this model, got one that differs in {', '.join(wrong)}."
        )
