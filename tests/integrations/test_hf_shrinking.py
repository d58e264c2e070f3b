from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from tests.integrations.hf_cases import Sentences, arguments, classifier
from torchprune_bayes.integrations.hf import ShrinkingCallback
from torchprune_bayes.structured import load_shrunk
from torchprune_bayes.structured.importances.magnitude import L1FilterImportance

EXAMPLE = {"input_ids": torch.arange(3, 9).unsqueeze(0)}
HEAD = ["classifier", "pre_classifier"]


def shrinking(at: int) -> ShrinkingCallback:
    return ShrinkingCallback(
        lambda model: L1FilterImportance(),
        EXAMPLE,
        at=at,
        sparsity=0.3,
        target="channels",
        ignored=HEAD,
    )


def trainer(folder: Path, callback: ShrinkingCallback, model: nn.Module, **changes: Any) -> Trainer:
    return Trainer(
        model, arguments(folder, **changes), train_dataset=Sentences(), callbacks=[callback]
    )


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("at", [0, 3])
def test_the_model_is_cut_and_trained_on_with_its_momentum(tmp_path: Path, at: int) -> None:
    callback = shrinking(at)
    run = trainer(tmp_path, callback, classifier())
    run.train()
    assert callback.report is not None
    assert size(run.model) < size(classifier())
    held = run.optimizer.optimizer.state
    for parameter in run.model.parameters():
        assert held[parameter]["exp_avg"].shape == parameter.shape
        assert int(held[parameter]["step"]) == 8
    run.model.eval()
    assert run.model(**EXAMPLE).logits.isfinite().all()


def test_a_shrunk_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path, shrinking(3), classifier(), save_strategy="steps", save_steps=5)
    whole.train()
    model = load_shrunk(classifier(4), tmp_path / "checkpoint-5")
    again = trainer(tmp_path / "again", shrinking(3), model)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_a_whole_model_cannot_take_a_shrunk_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path, shrinking(3), classifier(), save_strategy="steps", save_steps=5).train()
    run = trainer(tmp_path, shrinking(3), classifier())
    with pytest.raises(RuntimeError, match="size mismatch"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
