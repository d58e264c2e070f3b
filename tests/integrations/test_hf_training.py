from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from transformers import Trainer, TrainerCallback

from tests.integrations.hf_cases import Gated, Sentences, arguments, classifier
from torchprune_bayes import prunable_parameters
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations.hf import GateCallback, SpaMCallback, calibrate_on
from torchprune_bayes.training import GateTraining, SpaM, gate_parameter_groups


def spam_callback(**options: Any) -> SpaMCallback:
    return SpaMCallback(
        calibrate_on(Sentences(), num_samples=16, check_deterministic=False),
        params=lambda model: prunable_parameters(model, exclude=["classifier"]),
        every=1,
        **options,
    )


def trainer(folder: Path, callback: TrainerCallback, model: nn.Module, **changes: Any) -> Trainer:
    settings = {"weight_decay": 0.0, "learning_rate": 1e-3, "optim": "sgd", **changes}
    return Trainer(
        model, arguments(folder, **settings), train_dataset=Sentences(), callbacks=[callback]
    )


def same(first: nn.Module, second: nn.Module) -> bool:
    found = second.state_dict()
    return all(torch.equal(value, found[name]) for name, value in first.state_dict().items())


def test_spam_learns_the_prior_each_epoch_and_logs_the_evidence(tmp_path: Path) -> None:
    callback = spam_callback(burn_in=1)
    run = trainer(tmp_path, callback, classifier(), num_train_epochs=3)
    run.train()
    assert isinstance(callback.training, SpaM)
    assert [event["step"] for event in callback.training.history] == [2, 3]
    logged = [e["log_marginal_likelihood"] for e in run.state.log_history if len(e) > 5]
    assert callback.training.history[0]["log_marginal_likelihood"] in logged


def test_spam_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path, spam_callback(), classifier(), save_strategy="epoch")
    whole.train()
    again = trainer(tmp_path / "again", spam_callback(), classifier(4))
    with pytest.raises(ArgumentError, match=r"spam\.pt"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    again = trainer(tmp_path, spam_callback(), classifier(4))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(whole.model, again.model)


def test_spam_ends_training_when_the_evidence_stops_rising(tmp_path: Path) -> None:
    callback = spam_callback(patience=1)
    run = trainer(tmp_path, callback, classifier(), num_train_epochs=40, learning_rate=0.0)
    run.train()
    assert isinstance(callback.training, SpaM)
    assert callback.training.finished
    assert run.state.global_step == 4 * len(callback.training.history) < 160


GATES: dict[str, Any] = {"data_size": 32, "amount": 0.5, "beyond": True}


def gated(folder: Path, callback: GateCallback, **changes: Any) -> Trainer:
    model = Gated()
    optimizer = AdamW(gate_parameter_groups(model, 1e-2))
    return Trainer(
        model,
        arguments(folder, max_grad_norm=0.0, lr_scheduler_type="constant", **changes),
        train_dataset=Sentences(),
        callbacks=[callback],
        optimizers=(optimizer, None),
    )


def test_gates_learn_as_with_the_penalty_in_the_loss(tmp_path: Path) -> None:
    options = {**GATES, "kl": "sum", "prune_every": None}  # the penalty decides, not the noise
    run = gated(
        tmp_path, GateCallback(**options), per_device_train_batch_size=32, num_train_epochs=3
    )
    run.train()
    model = Gated()
    training = GateTraining(model, **options)
    optimizer = AdamW(gate_parameter_groups(model, 1e-2))
    data = Sentences()
    batch = data.ids, (data.ids[:, 0] > 16).long()
    for _ in range(3):
        optimizer.zero_grad()
        (model(*batch)["loss"] + training.penalty()).backward()
        optimizer.step()
        training.step()
    for name, value in _gates_of(model).items():
        # What a gate does to a sample depends on its place in the batch, the penalty does not.
        torch.testing.assert_close(_gates_of(run.model)[name], value, rtol=0.02, atol=0.01)


def _gates_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{i}": p for i, p in enumerate(gate_parameter_groups(model, 1.0)[1]["params"])}


def test_gates_close_and_stay_closed_in_the_last_epochs(tmp_path: Path) -> None:
    callback = GateCallback(finetune_epochs=1, prune_every=1, **GATES)
    run = gated(tmp_path, callback, num_train_epochs=3, save_strategy="epoch")
    run.train()
    assert isinstance(callback.training, GateTraining)
    closed = [event["closed"] for event in callback.training.history]
    assert closed[0] > 0
    assert callback.training.finetuning
    assert callback.training.history[-1]["pruned"] == 0
    assert run.state.log_history[-1]["closed_gates"] > 0
    again = GateCallback(finetune_epochs=1, prune_every=1, **GATES)
    resumed = gated(tmp_path, again, num_train_epochs=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert isinstance(again.training, GateTraining)
    assert again.training.history == callback.training.history
    assert same(run.model, resumed.model)


def test_gates_refuse_models_without_gates(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="gates"):
        trainer(tmp_path, GateCallback(**GATES), classifier()).train()
