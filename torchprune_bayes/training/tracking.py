"""Pruning metrics for any experiment tracker, from a custom training loop."""

from __future__ import annotations

from typing import Any

from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.training.gradual import GradualPruner


class PruningLog:
    """Logs the sparsity of a pruner, in total and of each layer, beside your own metrics.

    ``transformers.Trainer`` does not need this: its callbacks log to the trackers of ``report_to``.

    Args:
        tracker: A ``torch.utils.tensorboard.SummaryWriter``; or a function called as
            ``tracker(numbers, step=step)``: ``wandb.log``, ``mlflow.log_metrics``,
            ``trackio.log``, ``accelerator.log``, or a function of your own.
        pruner: The pruner at work.
        layers: Whether the sparsity of each tensor is logged when something was pruned.
        prefix: Prefix of the names of the pruner's metrics.

    Raises:
        ArgumentTypeError: If the tracker is neither.

    Cost: negligible; a count of the masks when something was pruned.

    Example:
        >>> import torch
        >>> from torchprune_bayes import one_shot
        >>> pruner = GradualPruner(torch.nn.Linear(4, 2), "magnitude", one_shot(0.5, at=1))
        >>> log = PruningLog(lambda numbers, step: print(step, numbers), pruner)
        >>> _ = pruner.step()
        >>> log(1, loss=0.25)
        1 {'loss': 0.25, 'pruning/sparsity': 0.5, 'pruning/sparsity/weight': 0.5}
    """

    def __init__(
        self, tracker: Any, pruner: GradualPruner, *, layers: bool = True, prefix: str = "pruning/"
    ) -> None:
        if not hasattr(tracker, "add_scalar") and not callable(tracker):
            raise ArgumentTypeError(
                "Expected a SummaryWriter or a function (numbers, step=...) as `tracker`, got "
                f"{type(tracker).__name__}."
            )
        self._tracker: Any = tracker
        self._pruner = pruner
        self._layers, self._prefix, self._seen = layers, prefix, 0

    def __call__(self, step: int, **numbers: float) -> None:
        """Log metrics of a step and those of the pruner.

        Args:
            step: The step of your loop.
            numbers: Further metrics by name, such as the loss.
        """
        metrics = dict(numbers) | {f"{self._prefix}sparsity": self._pruner.sparsity}
        if self._layers and len(self._pruner.history) != self._seen:
            metrics |= self._by_layer()
        self._seen = len(self._pruner.history)
        if not hasattr(self._tracker, "add_scalar"):
            self._tracker(metrics, step=step)
            return
        for name, value in metrics.items():
            self._tracker.add_scalar(name, value, step)

    def _by_layer(self) -> dict[str, float]:
        return {
            f"{self._prefix}sparsity/{name}": 1.0 - float(mask.sum()) / mask.numel()
            for name, mask in self._pruner.masks.items()
        }
