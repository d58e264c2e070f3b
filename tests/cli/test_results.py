import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from tests.cli import toys
from torchprune_bayes import prune_global
from torchprune_bayes.cli._measuring import loss_for, measure, supervised_loss
from torchprune_bayes.cli._results import count_pruned, save_pruned
from torchprune_bayes.errors import ArgumentError


def test_the_loss_follows_the_target():
    logits, labels, values = torch.randn(5, 3), torch.randint(3, (5,)), torch.randn(5, 3)
    assert torch.equal(supervised_loss(logits, labels), cross_entropy(logits, labels))
    assert torch.equal(supervised_loss(logits, values), mse_loss(logits, values))
    wrapped = type("Output", (), {"logits": logits})()
    assert torch.equal(supervised_loss(wrapped, labels), cross_entropy(logits, labels))
    assert loss_for([(logits, labels)]) is supervised_loss
    assert loss_for([{"input_ids": labels}]) is None


def test_regression_is_measured_by_its_loss():
    model = torch.nn.Linear(3, 2)
    batches = [(torch.randn(size, 3), torch.randn(size, 2)) for size in (5, 2)]
    found = measure(model, batches)
    errors = torch.cat([(model(inputs) - target).square() for inputs, target in batches])
    assert found is not None
    assert found.reliability is None
    assert found.metrics == {
        "loss": pytest.approx(float(errors.detach().mean()), rel=1e-5),
        "samples": 7,
    }


@pytest.mark.parametrize("batches", [[], [torch.zeros(2, 3)], [{"input_ids": torch.zeros(2)}]])
def test_data_without_labels_cannot_be_measured(batches):
    assert measure(torch.nn.Identity(), batches) is None


def test_counts_are_those_of_the_masks():
    masks = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.ones(6).bool()}
    found = count_pruned(masks)
    assert (found["weights"], found["pruned"], found["sparsity"]) == (10, 3, 0.3)
    assert found["tensors"] == {
        "a": {"shape": [2, 2], "pruned": 3, "sparsity": 0.75},
        "b": {"shape": [6], "pruned": 0, "sparsity": 0.0},
    }


def test_the_report_is_strict_json(tmp_path):
    model = toys.make_model()
    prune_global([(model[0], "weight")], "magnitude", amount=0.5)
    report = {"a": math.nan, "b": [math.inf, 1.5], "c": {1: Path("x")}, "d": None, "e": True}
    paths = save_pruned(model, tmp_path, report)
    assert all(path.exists() for path in paths)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found.pop("torchprune_bayes")
    assert found == {"a": None, "b": [None, 1.5], "c": {"1": "x"}, "d": None, "e": True}
    assert list(model.state_dict()) == list(toys.make_model().state_dict())


def test_a_model_that_is_not_pruned_is_not_saved(tmp_path):
    with pytest.raises(ArgumentError, match="pruned model"):
        save_pruned(toys.make_model(), tmp_path, {})
    assert list(tmp_path.iterdir()) == []
