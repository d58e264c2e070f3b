"""A resumed training is the uninterrupted one, from every checkpoint and with every callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Trainer, TrainerCallback

from tests.integrations.hf_cases import Gated, Sentences, arguments, classifier
from torchprune_bayes import cubic, linear, one_shot, prunable_parameters
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations._checkpoints import MASK_FILE
from torchprune_bayes.integrations.hf import (
    GateCallback,
    PruningCallback,
    SpaMCallback,
    calibrate_on,
)
from torchprune_bayes.training import gate_parameter_groups

STEPS = 6  # two epochs of three
SGD: dict[str, Any] = {"weight_decay": 0.0, "learning_rate": 1e-3, "optim": "sgd"}
Made = tuple[nn.Module, TrainerCallback, dict[str, Any]]


def by_step(seed: int) -> Made:
    return classifier(seed), PruningCallback("magnitude", cubic(0.8, 1, 6)), {}


def by_epoch(seed: int) -> Made:
    schedule = linear(0.8, 0, 2)
    return classifier(seed), PruningCallback("magnitude", schedule, unit="epoch"), {}


def spam(seed: int) -> Made:
    callback = SpaMCallback(
        calibrate_on(Sentences(), num_samples=8, check_deterministic=False),
        params=lambda model: prunable_parameters(model, exclude=["classifier"]),
        every=1,
        schedule=one_shot(0.5, at=1),
    )
    return classifier(seed), callback, SGD


def gates(seed: int) -> Made:
    callback = GateCallback(finetune_epochs=1, data_size=24, amount=0.4, beyond=True)
    return Gated(seed), callback, {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


CALLBACKS: dict[str, Callable[[int], Made]] = {
    "by step": by_step,
    "by epoch": by_epoch,
    "spam": spam,
    "gates": gates,
}


def trainer(folder: Path, made: Made, **changes: Any) -> Trainer:
    model, callback, options = made
    optimizer = AdamW(gate_parameter_groups(model, 1e-2)) if isinstance(model, Gated) else None
    return Trainer(
        model,
        arguments(folder, **(options | changes)),
        train_dataset=Sentences(24),
        callbacks=[callback],
        optimizers=(optimizer, None),
    )


def state(run: Trainer, callback: Any) -> list[Any]:
    inner: Any = callback.pruner if isinstance(callback, PruningCallback) else callback.training
    found = inner.state_dict()
    return [dict(run.model.state_dict()), found["history"], _tensors(found)]


def _tensors(value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {"": value}
    if not isinstance(value, dict):
        return {}
    return {f"{k}/{n}": t for k, v in value.items() for n, t in _tensors(v).items()}


@pytest.mark.parametrize("kind", CALLBACKS)
def test_from_every_checkpoint(tmp_path: Path, kind: str) -> None:
    made = CALLBACKS[kind](0)
    whole = trainer(tmp_path, made, save_strategy="steps", save_steps=1)
    whole.train()
    expected = state(whole, made[1])
    assert len(expected[1]) >= 2
    for step in range(1, STEPS + 1):
        other = CALLBACKS[kind](9)  # what is not restored shows
        again = trainer(tmp_path, other)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        torch.testing.assert_close(state(again, other[1]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_from_the_checkpoint_of_an_epoch(tmp_path: Path, kind: str) -> None:
    made = CALLBACKS[kind](0)
    whole = trainer(tmp_path, made, save_strategy="epoch")
    whole.train()
    other = CALLBACKS[kind](9)
    again = trainer(tmp_path, other)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(state(again, other[1]), state(whole, made[1]), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["by step", "spam", "gates"])
@pytest.mark.parametrize("length", [0, 40])
def test_damaged_states_are_refused_in_a_sentence(tmp_path: Path, kind: str, length: int) -> None:
    trainer(tmp_path, CALLBACKS[kind](0), save_strategy="steps", save_steps=3).train()
    name = {"by step": MASK_FILE, "spam": "spam.pt", "gates": "gates.pt"}[kind]
    path = tmp_path / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ArgumentError, match=f"Expected .*{name}"):
        trainer(tmp_path, CALLBACKS[kind](1)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )
