from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DistilBertForSequenceClassification, Trainer

from tests.integrations.hf_cases import Sentences, arguments, classifier
from torchprune_bayes import Calibration, cubic, one_shot, prunable_parameters
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    ParameterError,
    TorchPruneBayesWarning,
)
from torchprune_bayes.integrations._checkpoints import MASK_FILE, read_pruner
from torchprune_bayes.integrations.hf import PruningCallback, calibrate_on

HEAD = ["classifier", "pre_classifier"]
SCHEDULE = cubic(0.8, begin=2, end=6, every=2)


def callback(
    schedule: Any = SCHEDULE, method: str = "magnitude", **options: Any
) -> PruningCallback:
    return PruningCallback(method, schedule, exclude=HEAD, **options)


def trainer(folder: Path, pruning: PruningCallback, seed: int = 0, **changes: Any) -> Trainer:
    return Trainer(
        classifier(seed),
        arguments(folder, **changes),
        train_dataset=Sentences(),
        eval_dataset=Sentences(16),
        callbacks=[pruning],
        compute_metrics=pruning.metrics(),
    )


def sparsity(model: nn.Module) -> float:
    weights = [getattr(*pair) for pair in prunable_parameters(model, exclude=HEAD)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def reached(run: Trainer) -> list[float]:
    """Sparsity that was logged with the loss of each step."""
    return [entry["sparsity"] for entry in run.state.log_history if "loss" in entry]


def test_follows_the_schedule_and_logs_it(tmp_path: Path) -> None:
    pruning = callback()
    run = trainer(tmp_path, pruning)
    run.train()
    expected = [SCHEDULE(step - step % 2) for step in range(1, 9)]
    assert reached(run) == pytest.approx(expected, abs=1e-3)
    assert sparsity(run.model) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("at", [0, 8])
def test_prunes_before_and_after_training(tmp_path: Path, at: int) -> None:
    run = trainer(tmp_path, callback(one_shot(0.5, at=at)))
    run.train()
    assert sparsity(run.model) == pytest.approx(0.5, abs=1e-3)
    assert reached(run)[:7] == pytest.approx([0.5 if at == 0 else 0.0] * 7, abs=1e-3)


def test_a_schedule_can_count_epochs_and_follow_the_length_of_training(tmp_path: Path) -> None:
    pruning = callback(lambda epochs: cubic(0.8, begin=0, end=epochs), unit="epoch")
    run = trainer(tmp_path, pruning)
    run.train()
    assert [event["step"] - 1 for event in pruning.pruner.history] == [1, 2]  # type: ignore[union-attr]
    # Before the checkpoint of an epoch's last step is written, as the log of that step shows.
    assert reached(run)[2:] == pytest.approx([0.0] + [0.7] * 4 + [0.8], abs=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_moments_momentum_and_decay_do_not_move_what_is_pruned(tmp_path: Path, optim: str) -> None:
    options = "momentum=0.9" if optim == "sgd" else None
    pruning = callback()
    run = trainer(tmp_path, pruning, optim=optim, optim_args=options)
    run.train()
    masks = pruning.pruner.masks  # type: ignore[union-attr]
    parameters = dict(run.model.named_parameters())
    held = run.optimizer.optimizer.state
    for name, mask in masks.items():
        parts = [v for v in held[parameters[name]].values() if v.shape == mask.shape]
        assert parts
        assert not any(part[~mask].any() for part in [parameters[name].detach(), *parts])


def test_half_precision_and_accumulated_gradients(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(cubic(0.8, 1, 3)), bf16=True, gradient_accumulation_steps=2)
    run.train()
    assert sparsity(run.model) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("method", ["magnitude", "woodfisher"])
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(
    tmp_path: Path, method: str
) -> None:
    def pruning() -> PruningCallback:
        if method == "magnitude":
            return callback()
        found = calibrate_on(Sentences(), num_samples=8, batch_size=4)
        return callback(method=method, calibration=found)

    whole = trainer(tmp_path / "whole", pruning(), save_strategy="steps", save_steps=5)
    whole.train()
    # Other random weights, so that anything that is not restored shows.
    again = trainer(tmp_path / "again", pruning(), seed=9)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(state(whole.model), state(again.model))
    assert sparsity(again.model) == pytest.approx(0.8, abs=1e-3)


def test_resume_takes_the_masks_of_the_file_not_every_zero(tmp_path: Path) -> None:
    first = callback(one_shot(0.5))
    run = trainer(tmp_path, first, save_strategy="steps", save_steps=4)
    run.train()
    path = tmp_path / "checkpoint-4" / "model.safetensors"
    _edit(path, "distilbert.transformer.layer.0.ffn.lin1.weight", lambda w: w * 0)
    second = callback(one_shot(0.5))
    trainer(tmp_path, second).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.sparsity == first.sparsity

    os.remove(tmp_path / "checkpoint-4" / MASK_FILE)
    third = callback(one_shot(0.5))
    with pytest.warns(TorchPruneBayesWarning, match="every zero"):
        trainer(tmp_path, third).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert third.sparsity > first.sparsity


def test_resume_without_the_file_finds_the_zeros(tmp_path: Path) -> None:
    """Killed between the weights and the masks; the record in the Trainer's state proves them."""
    whole = trainer(tmp_path / "whole", callback(), save_strategy="steps", save_steps=5)
    whole.train()
    os.remove(tmp_path / "whole" / "checkpoint-5" / MASK_FILE)
    again = trainer(tmp_path / "again", callback())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(state(whole.model), state(again.model))


def test_resume_refuses_a_mixture_of_checkpoints(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(), save_strategy="steps", save_steps=4)
    run.train()
    dense = classifier(5)
    for folder, error in (("checkpoint-4", AlignmentError), ("checkpoint-8", ArgumentError)):
        dense.save_pretrained(tmp_path / folder)
        if error is ArgumentError:
            os.remove(tmp_path / folder / MASK_FILE)
        with pytest.raises(error, match="Expected"), _any_warning():
            trainer(tmp_path, callback()).train(resume_from_checkpoint=str(tmp_path / folder))


def test_resume_of_a_dense_checkpoint_says_so(tmp_path: Path) -> None:
    dense = Trainer(
        classifier(),
        arguments(tmp_path, save_strategy="steps", save_steps=4),
        train_dataset=Sentences(),
    )
    dense.train()
    run = trainer(tmp_path, callback())
    with pytest.warns(TorchPruneBayesWarning, match="not made with this callback"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert sparsity(run.model) == pytest.approx(0.8, abs=1e-3)


BEST: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    # The dense model wins: the first evaluation has the smallest share of zeros.
    "metric_for_best_model": "sparsity",
    "greater_is_better": False,
}


def test_the_best_model_is_looked_for_at_the_final_sparsity(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(), **BEST)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    assert sparsity(run.model) == pytest.approx(0.8, abs=1e-3)
    weights = DistilBertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    assert same(state(weights), state(run.model))


def test_a_denser_best_model_brings_its_own_masks_and_a_warning(tmp_path: Path) -> None:
    pruning = callback(forget_best=False)
    run = trainer(tmp_path, pruning, **BEST)
    with pytest.warns(TorchPruneBayesWarning):
        run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert sparsity(run.model) == pruning.sparsity == 0.0


def test_the_saved_model_loads_where_nothing_knows_of_pruning(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(), save_strategy="steps", save_steps=8)
    run.train()
    loaded = DistilBertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    assert same(state(loaded), state(run.model))
    record, masks = read_pruner(tmp_path / "checkpoint-8" / MASK_FILE)
    assert record["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert all(
        not value[~masks[name]].any() for name, value in state(loaded).items() if name in masks
    )
    kept = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert kept["stateful_callbacks"]["torchprune_bayes"]["sha256"] == record["sha256"]


def test_a_second_training_goes_on_from_the_masks_of_the_first(tmp_path: Path) -> None:
    pruning = callback(one_shot(0.5))
    run = trainer(tmp_path, pruning)
    run.train()
    first = pruning.pruner.masks  # type: ignore[union-attr]
    run.train()
    second = pruning.pruner.masks  # type: ignore[union-attr]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sparsity(run.model) == pytest.approx(0.5, abs=1e-3)


def test_warns_if_training_ends_before_the_schedule(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(cubic(0.8, begin=2, end=100, every=2)))
    with pytest.warns(TorchPruneBayesWarning, match="ended before its schedule"):
        run.train()


@pytest.mark.parametrize("kind", ["object", "function"])
def test_calibration_can_be_given_or_made(tmp_path: Path, kind: str) -> None:
    run_folder = tmp_path / kind
    model = classifier()
    pairs = prunable_parameters(model, exclude=HEAD)
    batches = [{"input_ids": Sentences().ids, "labels": (Sentences().ids[:, 0] > 16).long()}]
    if kind == "object":
        given: Any = Calibration(model, batches, params=pairs, num_samples=8)
    else:
        given = lambda model, params: Calibration(model, batches, params=params, num_samples=8)  # noqa: E731
    pruning = callback(one_shot(0.5, at=3), "diagonal-fisher", calibration=given)
    run = Trainer(model, arguments(run_folder), train_dataset=Sentences(), callbacks=[pruning])
    run.train()
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)


def test_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="calibrate_on"):
        callback(method="woodfisher")
    with pytest.raises(ArgumentError, match="unit"):
        callback(unit="sample")
    run = trainer(tmp_path, callback())
    run.model.classifier.weight.ds_id = 1  # as DeepSpeed marks what it has sharded
    with pytest.raises(ParameterError, match=r"sharded `classifier\.weight`"):
        run.train()
    shutil.rmtree(tmp_path)


def _edit(path: Path, name: str, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def _any_warning() -> Any:
    import warnings
    from contextlib import contextmanager

    @contextmanager
    def quiet() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    return quiet()
