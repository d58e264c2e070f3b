from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from tests.integrations.hf_cases import Sentences, arguments, classifier
from torchprune_bayes import one_shot
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations._hf_distillation import distillation_loss
from torchprune_bayes.integrations.hf import DistillationTrainer, PruningCallback


def reference(logits: Tensor, target: Tensor, labels: Tensor, temperature: float) -> float:
    """Equation by equation, one position at a time."""
    total, count = 0.0, 0
    for student, teacher, label in zip(logits.double(), target.double(), labels, strict=True):
        if int(label) == -100:
            continue
        p, q = ((x / temperature).exp() for x in (teacher, student))
        p, q = p / p.sum(), q / q.sum()
        total += float((p * (p / q).log()).sum())
        count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_loss_equals_its_definition(temperature: float) -> None:
    logits, target = torch.randn(2, 7, 5).unbind()
    labels = torch.tensor([0, 1, -100, 3, 4, -100, 2])
    found = distillation_loss(logits, target, labels, temperature)
    assert float(found) == pytest.approx(reference(logits, target, labels, temperature), rel=1e-5)
    per_item = distillation_loss(logits, target, labels, temperature, items=10)
    assert float(per_item) == pytest.approx(float(found) * 5 / 10, rel=1e-6)


def run(folder: Path, **options: Any) -> DistillationTrainer:
    pruning = PruningCallback("magnitude", one_shot(0.7), exclude=["classifier"])
    model = classifier(options.pop("seed", 0))
    changes = {key: options.pop(key) for key in list(options) if key in ("num_train_epochs",)}
    return DistillationTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        callbacks=[pruning],
        **options,
    )


def distance(trainer: DistillationTrainer) -> float:
    model = trainer.model.eval()
    with torch.no_grad():
        student, teacher = (m(input_ids=Sentences().ids).logits for m in (model, trainer.teacher))
    return float(distillation_loss(student, teacher, None, 1.0))


def test_the_pruned_model_comes_near_to_the_dense_one(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 1.0):
        trainer = run(tmp_path, distillation_weight=weight, num_train_epochs=8)
        dense = {n: p.clone() for n, p in trainer.teacher.named_parameters()}
        trainer.train()
        found[weight] = distance(trainer)
        assert all(torch.equal(p, dense[n]) for n, p in trainer.teacher.named_parameters())
    assert found[1.0] < found[0.0] / 10


def test_without_weight_it_is_the_trainer(tmp_path: Path) -> None:
    ours = run(tmp_path, distillation_weight=0.0)
    ours.train()
    plain = Trainer(
        classifier(),
        arguments(tmp_path),
        train_dataset=Sentences(),
        callbacks=[PruningCallback("magnitude", one_shot(0.7), exclude=["classifier"])],
    )
    plain.train()
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate(Sentences())["eval_loss"])


def _language_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 30, "n_positions": 8}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**size, **drop, bos_token_id=1, eos_token_id=2))


def test_accumulated_batches_weigh_as_one(tmp_path: Path) -> None:
    tokens = [{"input_ids": ids, "labels": ids} for ids in Sentences(8).ids]
    torch.manual_seed(5)
    teacher = _language_model()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    found = []
    for accumulated, size in ((1, 8), (4, 2)):
        trainer = DistillationTrainer(
            model=_language_model(),
            args=arguments(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulated,
                num_train_epochs=1,
                optim="sgd",
                max_grad_norm=0.0,
            ),
            train_dataset=tokens,
            teacher=teacher,
        )
        trainer.train()
        found.append(trainer.model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


def test_refuses_impossible_values(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="temperature"):
        run(tmp_path, temperature=0.0)
    with pytest.raises(ArgumentError, match="distillation_weight"):
        run(tmp_path, distillation_weight=1.5)
