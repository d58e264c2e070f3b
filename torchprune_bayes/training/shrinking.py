"""Shrinking a model along a schedule, in any training loop, and what the training costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchprune_bayes._checks import check_count, check_keys
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.schedules import Schedule
from torchprune_bayes.structured import ShrinkReport, Stages, check_shrinkable, shrink
from torchprune_bayes.structured.option_checks import check_later_call
from torchprune_bayes.structured.support import OF_THE_MODEL
from torchprune_bayes.training._due import due_step
from torchprune_bayes.training._optimizers import bare_optimizer

logger = logging.getLogger("torchprune_bayes")

_STATE = {"step", "left"}


class GradualShrinking:
    """Remove units of a model along a schedule while it trains; call :meth:`step` in the loop.

    SNAP-it during training (`Verdenius, Stol and Forré, 2020 <https://arxiv.org/abs/2006.00896>`_)
    and other ways to shrink in stages: at each event the remaining units are scored again, as many
    as are due are removed, and the optimizer keeps the momentum of the remaining ones. A step is an
    update or an epoch, whichever the schedule counts; steps are counted from 1, and what is due at
    0 is done at the first call.

    Args:
        model: The model; changed in place. Parameters of removed units are replaced by new objects.
        importance: A function ``model -> importance``, called before every cut. It returns a
            calibration, which is the recommended way, see
            :func:`~torchprune_bayes.structured.shrink`; or an importance.
        schedule: Sparsity of the whole model after each step.
        example_inputs: See :func:`~torchprune_bayes.structured.shrink`.
        optimizer: Its state is cut with the model; wrapped by accelerate or not.
        ema: Averaged copies of the model, cut in the same way.
        options: Further arguments of :func:`~torchprune_bayes.structured.shrink`, such as
            ``target`` and ``ignored``.

    Attributes:
        reports: What was cut, one report for each cut.

    Raises:
        ArgumentError: If ``options`` contain a sparsity or an impossible value, or there are too
            few units for the schedule.
        ArgumentTypeError: If ``schedule`` is not one, ``importance`` is no function of the model,
            or ``options`` contain what is none.
        ParameterError: If the model cannot be shrunk.

    Cost: at a due step that of :func:`~torchprune_bayes.structured.shrink`, at others nothing.

    Example:
        >>> import torch
        >>> from torchprune_bayes import halving
        >>> from torchprune_bayes.structured import L1FilterImportance
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> shrinking = GradualShrinking(
        ...     model,
        ...     lambda model: L1FilterImportance(),
        ...     halving(0.75, begin=1, every=2, steps=1),
        ...     example_inputs=torch.zeros(1, 4),
        ...     optimizer=optimizer,
        ...     target="channels",
        ... )
        >>> for epoch in range(5):
        ...     model(torch.randn(8, 4)).square().sum().backward()
        ...     optimizer.step()
        ...     report = shrinking.step()
        ...     print(model[0].out_features, end=" ")
        8 8 6 6 4
    """

    def __init__(
        self,
        model: nn.Module,
        importance: Callable[[nn.Module], Any],
        schedule: Schedule,
        *,
        example_inputs: Any,
        optimizer: Optimizer | None = None,
        ema: nn.Module | Iterable[nn.Module] = (),
        **options: Any,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise ArgumentTypeError(f"Expected a Schedule, got {type(schedule).__name__}.")
        if "sparsity" in options:
            raise ArgumentError("Expected the sparsity in the schedule, got the option `sparsity`.")
        check_later_call(importance, options)
        self.reports: list[ShrinkReport] = []
        self._model, self._importance, self._schedule = model, importance, schedule
        self._inputs, self._options = example_inputs, options
        self._optimizer = None if optimizer is None else bare_optimizer(optimizer)
        self._averages = [ema] if isinstance(ema, nn.Module) else list(ema)
        self._stages, self._step = Stages(), 0
        fixed = {key: options[key] for key in OF_THE_MODEL if key in options}
        check_shrinkable(model, example_inputs, sparsity=schedule.final, **fixed)

    @property
    def left(self) -> float:
        """Fraction of the target that remains of the whole model."""
        return self._stages.left

    @property
    def finished(self) -> bool:
        """Whether the end of the schedule is reached."""
        return self._stages.due(self._schedule.final) is None or self._is_past_end()

    def step(self) -> ShrinkReport | None:
        """Count a step; cut if that is due.

        Returns:
            The report of the cut, or ``None``. If anything fails nothing is changed, and the step
            is not counted.
        """
        now = self._step + 1
        due = due_step(self._schedule, now)
        sparsity = None if due is None else self._stages.due(self._schedule(due))
        report = None if sparsity is None else self._cut(sparsity)
        self._step = now
        return report

    def state_dict(self) -> dict[str, Any]:
        """Steps and remaining fraction; :func:`~.structured.save_shrunk` saves the model."""
        return {"step": self._step, "left": self.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`, with the model as it was shrunk by then.

        Raises:
            ArgumentError: If ``state`` is not a state of this class.
        """
        check_keys("a shrinking's state", state, _STATE)
        check_count("step", state["step"], minimum=0)
        left = state["left"]
        if not isinstance(left, float) or not 0 < left <= 1:
            raise ArgumentError(f"Expected `left` as a fraction above 0, got {left!r:.80}.")
        self._step, self._stages = state["step"], Stages(left=left)

    def _cut(self, sparsity: float) -> ShrinkReport:
        report = shrink(
            self._model,
            self._inputs,
            self._importance(self._model),
            sparsity=sparsity,
            optimizer=self._optimizer,
            ema=self._averages,
            **self._options,
        )
        self._stages.count(report)
        self.reports.append(report)
        logger.info("Shrunk to %.1f %% of the whole.", 100.0 * self.left)
        return report

    def _is_past_end(self) -> bool:
        return self._schedule.end is not None and self._step >= self._schedule.end
