"""Metrics, calibration from data sets, LoRA merging: the parts beside the callback."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from tests.integrations.hf_cases import Sentences, arguments, classifier
from torchprune_bayes import prunable_parameters, prune_global
from torchprune_bayes.errors import ArgumentError
from torchprune_bayes.integrations.hf import TrainerMetrics, calibrate_on, merge_adapters
from torchprune_bayes.methods import bake
from torchprune_bayes.reports import accuracy, expected_calibration_error, negative_log_likelihood


def test_metrics_are_those_of_the_reports() -> None:
    logits, labels = torch.randn(20, 4), torch.randint(4, (20,))
    found = TrainerMetrics()(EvalPrediction(logits.numpy(), labels.numpy()))
    assert found["accuracy"] == pytest.approx(accuracy(logits, labels))
    assert found["nll"] == pytest.approx(negative_log_likelihood(logits, labels))
    assert found["ece"] == pytest.approx(expected_calibration_error(logits, labels))


def test_metrics_batch_by_batch_are_those_of_all() -> None:
    logits, labels = torch.randn(20, 4), torch.randint(4, (20,))
    metrics = TrainerMetrics()
    whole = metrics((logits, labels))
    assert metrics((logits[:9], labels[:9]), compute_result=False) == {}
    assert metrics((logits[9:], labels[9:]), compute_result=True) == pytest.approx(whole)


def test_causal_metrics_compare_with_the_next_token() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, 3] = -100
    found = TrainerMetrics(causal=True)((logits.numpy(), labels.numpy()))
    expected = negative_log_likelihood(logits[:, :-1], labels[:, 1:])
    assert found["nll"] == pytest.approx(expected)


@pytest.mark.parametrize("batch_eval", [False, True])
def test_the_trainer_logs_them(tmp_path: Path, batch_eval: bool) -> None:
    run = Trainer(
        classifier(),
        arguments(tmp_path, batch_eval_metrics=batch_eval),
        eval_dataset=Sentences(13),
        compute_metrics=TrainerMetrics(),
    )
    found = run.evaluate()
    assert found["eval_nll"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert 0 <= found["eval_ece"] <= 1


def test_calibration_draws_from_the_data_set_what_the_model_takes() -> None:
    model = classifier()
    pairs = prunable_parameters(model, exclude=["classifier"])
    make = calibrate_on(Sentences(), num_samples=12, batch_size=5, seed=4)
    calibration = make(model, pairs)
    assert calibration.space.pairs() == pairs
    rows = torch.cat(list(calibration.gradients()))
    again = torch.cat(list(make(model, pairs).gradients()))
    assert torch.equal(rows, again)
    assert rows.shape == (12, calibration.space.numel)
    with pytest.raises(ArgumentError, match="batch_size"):
        calibrate_on(Sentences(), batch_size=0)


class LoraLinear(nn.Module):
    """The interface of peft's LoRA layer: ``base_layer`` and ``get_delta_weight``."""

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Parameter(torch.randn(rank, base_layer.in_features))
        self.up = nn.Parameter(torch.randn(base_layer.out_features, rank))

    def get_delta_weight(self, adapter: str) -> Tensor:
        return self.up @ self.down

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + inputs @ self.get_delta_weight("default").T


class Adapted(nn.Module):
    """A model of peft's: the base inside, merged and given out by ``merge_and_unload``."""

    def __init__(self, base: nn.Sequential) -> None:
        super().__init__()
        self.base_model = base
        self.base_model[0] = LoraLinear(self.base_model[0], rank=2)  # type: ignore[arg-type]

    def merge_and_unload(self) -> nn.Module:
        layer: Any = self.base_model[0]
        layer.base_layer.weight.data += layer.get_delta_weight("default")
        self.base_model[0] = layer.base_layer
        return self.base_model


def adapted() -> tuple[Adapted, Tensor, dict[str, Tensor]]:
    """With adapters; the weight and the masks before."""
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        base[0].get_parameter("weight")[1, 1] = 0.0
    masks = prune_global(prunable_parameters(base), "magnitude", amount=0.5).masks
    bake(base)
    weight = base[0].get_parameter("weight").detach().clone()
    return Adapted(base), weight, masks


def test_merged_adapters_leave_the_zeros() -> None:
    model, weight, _ = adapted()
    delta = model.base_model[0].get_delta_weight("default")  # type: ignore[operator]
    merged = merge_adapters(deepcopy(model))
    expected = weight + delta * (weight != 0)
    torch.testing.assert_close(merged[0].weight, expected)  # type: ignore[index]
    assert int((merged[0].weight == 0).sum()) == int((weight == 0).sum())  # type: ignore[index]


def test_masks_say_which_zeros_were_pruned() -> None:
    model, weight, _ = adapted()
    masks = {"0.weight": torch.ones_like(weight, dtype=torch.bool)}
    masks["0.weight"][2] = False
    merged = merge_adapters(model, masks)
    assert torch.equal(merged[0].weight == 0, ~masks["0.weight"])  # type: ignore[index]


def test_refuses_models_without_adapters_and_misfits() -> None:
    with pytest.raises(ArgumentError, match="LoRA"):
        merge_adapters(nn.Linear(2, 2))
    model, _, _ = adapted()
    with pytest.raises(ArgumentError, match="shape"):
        merge_adapters(model, {"0.weight": torch.ones(1, dtype=torch.bool)})
