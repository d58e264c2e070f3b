from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from tests.contracts.state import unchanged
from tests.integrations.hf_cases import Sentences, arguments, classifier
from torchprune_bayes import cubic
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.integrations.hf import ShrinkingCallback
from torchprune_bayes.structured import load_shrunk
from torchprune_bayes.structured.importances.magnitude import L1FilterImportance

EXAMPLE = {"input_ids": torch.arange(3, 9).unsqueeze(0)}
HEAD = ["classifier", "pre_classifier"]


def shrinking(at: int, **changes: Any) -> ShrinkingCallback:
    options: dict[str, Any] = {"sparsity": 0.3, "target": "channels", "ignored": HEAD}
    return ShrinkingCallback(
        lambda model: L1FilterImportance(), EXAMPLE, at=at, **{**options, **changes}
    )


def trainer(folder: Path, callback: ShrinkingCallback, model: nn.Module, **changes: Any) -> Trainer:
    return Trainer(
        model, arguments(folder, **changes), train_dataset=Sentences(), callbacks=[callback]
    )


def along(**changes: Any) -> ShrinkingCallback:
    """Half of the FLOPs in four cuts over the first six of eight updates."""
    options: dict[str, Any] = {"target": "flops", "ignored": HEAD}
    return ShrinkingCallback(
        lambda model: L1FilterImportance(),
        EXAMPLE,
        schedule=lambda updates: cubic(0.5, begin=0, end=updates - 2, times=3),
        **{**options, **changes},
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


def test_a_schedule_cuts_between_updates_to_sparsities_of_the_whole(tmp_path: Path) -> None:
    callback = along()
    run = trainer(tmp_path, callback, classifier())
    run.train()
    schedule = cubic(0.5, begin=0, end=6, times=3)
    due = [schedule(step) for step in schedule.steps() if schedule(step)]
    assert len(callback.reports) == len(due) == 3
    left, flops = 1.0, callback.reports[0].flops
    assert flops is not None
    for sparsity, report in zip(due, callback.reports, strict=True):
        assert report.flops is not None
        left *= 1.0 - report.flops.sparsity
        assert left <= 1.0 - sparsity + 1e-9
        assert left > 1.0 - sparsity - 0.05
        after = report.flops.after
    assert callback.left == pytest.approx(after / flops.before)
    for parameter in run.model.parameters():
        assert run.optimizer.optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_a_run_with_a_schedule_resumes_bit_for_bit_between_two_cuts(tmp_path: Path) -> None:
    whole = trainer(tmp_path, along(), classifier(), save_strategy="steps", save_steps=5)
    whole.train()
    model = load_shrunk(classifier(4), tmp_path / "checkpoint-5")
    callback = along()
    again = trainer(tmp_path / "again", callback, model)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(callback.reports) == 1
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_what_cannot_be_shrunk_is_refused_before_training(tmp_path: Path) -> None:
    for options in ({"min_keep": 60}, {"ignored": ["distilbert"]}):
        for callback in (along(**options), shrinking(3, **options)):
            run = trainer(tmp_path, callback, classifier())
            with unchanged(run.model), pytest.raises(ArgumentError, match="a sparsity of at most"):
                run.train()
            assert run.state.global_step == 0
    with pytest.raises(ArgumentError, match="Expected a `schedule`, or `sparsity` and `at`"):
        ShrinkingCallback(lambda model: None, EXAMPLE, schedule=cubic(0.5, 0, 4), sparsity=0.5)


def test_example_inputs_go_where_the_model_is(tmp_path: Path) -> None:
    model = classifier().to("meta")
    inputs = {"a": torch.zeros(1), "b": (torch.zeros(2), [torch.zeros(3), None]), "c": 4}
    placed = ShrinkingCallback(lambda model: None, inputs, sparsity=0.5)._inputs(model)
    assert placed["a"].device.type == placed["b"][0].device.type == "meta"
    assert placed["b"][1][0].device.type == "meta"
    assert placed["b"][1][1] is None
    assert placed["c"] == 4


def test_a_whole_model_cannot_take_a_shrunk_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path, shrinking(3), classifier(), save_strategy="steps", save_steps=5).train()
    run = trainer(tmp_path, shrinking(3), classifier())
    with pytest.raises(RuntimeError, match="size mismatch"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`sparsity`, or a `schedule`"),
        ({"sparsity": 0.3, "taget": "flops"}, "got `taget`"),
        ({"sparsity": 0.3, "allocation": "best"}, "`allocation`"),
    ],
)
def test_a_call_that_would_fail_at_the_cut_is_refused_at_once(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        ShrinkingCallback(lambda model: L1FilterImportance(), EXAMPLE, at=3, **options)
    with pytest.raises(ArgumentTypeError, match="function of the model"):
        ShrinkingCallback(L1FilterImportance(), EXAMPLE, sparsity=0.3)


def test_a_training_too_short_for_the_cuts_says_so(tmp_path: Path, caplog: Any) -> None:
    with pytest.raises(ArgumentError, match="first cut within the 2 updates"):
        trainer(tmp_path, shrinking(3), classifier(), max_steps=2).train()
    callback = along()
    callback._schedule = cubic(0.5, begin=0, end=6, times=3)
    trainer(tmp_path, callback, classifier(), max_steps=2).train()
    assert "will not be reached" in caplog.text
