"""Pruning and shrinking that happens in all processes or in none.

In plain words: first all decide, then all receive the decision of the first process, then all apply
it. A failure in one process, at any of these points, fails in all, and each restores its state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchprune_bayes._distributed import (
    all_gathered,
    entered_on_all_ranks,
    errors_shared,
    on_all_ranks,
)
from torchprune_bayes.integrations._checkpoints import fingerprint
from torchprune_bayes.integrations._ranks import (
    from_first,
    same_everywhere,
    shared_buffers,
    take_from_first,
)
from torchprune_bayes.integrations._restoring import (
    optimizer_kept_on_error,
    tables_kept_on_error,
)
from torchprune_bayes.methods.global_pruning import apply_decision
from torchprune_bayes.methods.module_state import all_or_nothing
from torchprune_bayes.params import ParameterSpace, unwrap
from torchprune_bayes.training import GradualPruner
from torchprune_bayes.types import Decision, ParameterPairs

logger = logging.getLogger("torchprune_bayes")


def step_on_all_ranks(pruner: GradualPruner) -> dict[str, Any] | None:
    """Call ``pruner.step()`` in every process; if something is pruned, all prune the same.

    Masks, new weights and the remaining weights are those of the first process. If anything
    fails in any process, nothing is changed in any. Steps at which nothing is due cost no
    communication.

    Raises:
        CalibrationError: If it failed in another process.
    """
    if not pruner.due:
        return pruner.step()
    with errors_shared(), shared_buffers(pruner.space.model):
        planned = on_all_ranks(pruner.plan)
        decision = agreed(Decision(planned.masks, planned.updates), pruner.space)
        planned = replace(planned, masks=decision.masks, updates=decision.updates)
        with entered_on_all_ranks(lambda: pruner.applied(planned)) as event:
            if event is not None:
                take_from_first(tensor.leaf for tensor in pruner.space)
            all_gathered(None)
    return event


def agreed(decision: Decision, space: ParameterSpace) -> Decision:
    """Masks and new weights of the first process, in every process, on the tensors' devices."""
    if not same_everywhere((fingerprint(decision.masks), decision.updates is None)):
        logger.warning("Masks differed between processes; those of the first one are taken.")
        masks, updates = from_first((decision.masks, decision.updates))
        places = {tensor.name: tensor.leaf.device for tensor in space}
        moved = None if updates is None else _placed(updates, places)
        decision = replace(decision, masks=_placed(masks, places), updates=moved)
    take_from_first((decision.updates or {}).values())
    return decision


@contextmanager
def decision_applied(
    space: ParameterSpace, decision: Decision, pairs: ParameterPairs
) -> Iterator[None]:
    """Apply a decision; if the body fails as well, everything is restored."""
    places = list(pairs)
    with all_or_nothing(dict.fromkeys([*space.pairs(), *places]), values=True):
        apply_decision(space, decision, places)
        yield


@contextmanager
def uncut_on_error(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Restore a model's tensors and numbers, and the optimizer's parameters, if the body fails.

    For code that replaces tensors, as shrinking does, and does not write into them.
    """
    with tables_kept_on_error(unwrap(model)), optimizer_kept_on_error(optimizer):
        yield


def _placed(tensors: Mapping[str, Tensor], places: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.to(places[name]) for name, tensor in tensors.items()}
