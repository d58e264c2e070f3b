from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from tests.integrations.hf_cases import Sentences, arguments, classifier
from tests.integrations.processes import PROCESSES, in_two_processes, load_all, save_from
from torchprune_bayes import Calibration, cubic
from torchprune_bayes.integrations.accelerate import ShardedCalibration
from torchprune_bayes.integrations.hf import PruningCallback


def _sharded(model: nn.Module, params: Any) -> Calibration:
    data = Sentences()
    batches = [{"input_ids": ids, "labels": (ids[:, 0] > 16).long()} for ids in data.ids.split(5)]
    return ShardedCalibration(model, batches, params=params, num_samples=12)


def _trained(folder: Path) -> None:
    pruning = PruningCallback(
        "woodfisher", cubic(0.8, begin=1, end=3), exclude=["classifier"], calibration=_sharded
    )
    settings = arguments(folder, per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
    run = Trainer(
        classifier(),
        settings,
        train_dataset=Sentences(),
        eval_dataset=Sentences(10),
        callbacks=[pruning],
        compute_metrics=pruning.metrics(),
    )
    assert run.accelerator.num_processes == PROCESSES
    run.train()
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    assert pruning.pruner is not None
    found = (pruning.pruner.masks, run.model.state_dict(), run.evaluate())
    save_from(settings.process_index, found, folder / "found")


def test_global_masks_under_ddp(tmp_path: Path) -> None:
    in_two_processes(_trained, tmp_path)
    first, second = load_all(tmp_path / "found")
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    for name, mask in first[0].items():
        assert torch.equal(mask, second[0][name])
        assert not first[1][name][~mask].any()
    assert first[2]["eval_sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert {"eval_nll", "eval_ece", "eval_accuracy"} < set(first[2])
    assert (tmp_path / "checkpoint-2" / "pruning_masks.safetensors").is_file()
