"""Distillation of the dense model's predictions into a pruned model."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from torchprune_bayes._checks import check_fraction, check_positive
from torchprune_bayes._extras import optional

with optional("transformers", "hf"):
    from transformers import Trainer

_IGNORED = -100


class DistillationTrainer(Trainer):
    """A ``transformers.Trainer`` whose loss also compares predictions with those of a teacher.

    ``(1 - weight) * loss + weight * temperature**2 * KL(teacher || student)``, both softened by
    the temperature (`Hinton et al., 2015 <https://arxiv.org/abs/1503.02531>`_, section 2). Takes
    gradient accumulation and labels of -100 into account as the Trainer's own loss does;
    evaluation is not changed. Combine it with your own Trainer as the first base class.

    Args:
        args: Arguments of the Trainer.
        teacher: The dense model; default a copy of the model as it is now.
        temperature: Softens both distributions.
        distillation_weight: ``weight``, in [0, 1].
        kwargs: Arguments of the Trainer.

    Raises:
        ArgumentError: If ``temperature`` or ``distillation_weight`` is out of range.

    Cost: one more forward pass per step, and the teacher's memory.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        temperature: float = 2.0,
        distillation_weight: float = 0.5,
        **kwargs: Any,
    ) -> None:
        check_positive("temperature", temperature)
        check_fraction("distillation_weight", distillation_weight)
        super().__init__(*args, **kwargs)
        copied: Any = deepcopy(self.model) if teacher is None else teacher
        self.teacher = copied.to(self.args.device).eval().requires_grad_(False)
        self.temperature = temperature
        self.distillation_weight = distillation_weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss, in training mixed with the distance to the teacher."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        teacher_inputs = dict(inputs)  # the Trainer may remove the labels
        result: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, outputs = result
        labels = teacher_inputs.pop("labels", None)
        with torch.no_grad():
            target = self.teacher(**teacher_inputs).logits
        summed = self._items_of(num_items_in_batch)
        distance = distillation_loss(outputs["logits"], target, labels, self.temperature, summed)
        weight = self.distillation_weight
        loss = (1 - weight) * loss + weight * distance
        return (loss, outputs) if return_outputs else loss

    def _items_of(self, num_items: Tensor | int | None) -> Tensor | float | None:
        # Where the Trainer's own loss is a sum over the items of all accumulated batches, ours is.
        if num_items is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return None
        spread = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return num_items / spread


def distillation_loss(
    logits: Tensor,
    target: Tensor,
    labels: Tensor | None,
    temperature: float,
    items: Tensor | float | None = None,
) -> Tensor:
    """``T**2 * KL(softmax(target / T) || softmax(logits / T))`` per position, summed or averaged.

    Args:
        logits: The student's ``[..., K]``.
        target: The teacher's ``[..., K]``.
        labels: ``[...]``; positions with -100 are ignored. Other shapes are not used.
        temperature: ``T``.
        items: Divisor of the sum; default the number of positions that are not ignored.

    Example:
        >>> float(distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), None, 2.0))
        0.0
    """
    student, teacher = ((part / temperature).log_softmax(-1) for part in (logits, target))
    distance = kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    if labels is not None and labels.shape == distance.shape:
        distance = distance[labels != _IGNORED]
    count = max(distance.numel(), 1) if items is None else items
    return temperature**2 * distance.sum() / count
