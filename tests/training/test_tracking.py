import pytest
import torch
from torch import nn

from torchprune_bayes import GradualPruner, linear
from torchprune_bayes.errors import ArgumentTypeError
from torchprune_bayes.training import PruningLog


def train(tracker, steps=4, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    pruner = GradualPruner(model, "magnitude", linear(0.5, begin=1, end=3))
    log = PruningLog(tracker, pruner, **options)
    for step in range(1, steps + 1):
        pruner.step()
        log(step, loss=1.0 / step)
    return pruner


def test_numbers_reach_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        pruner = train(writer)
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 5)]
    assert [step for step, _ in found["pruning/sparsity"]] == [1, 2, 3, 4]
    assert found["pruning/sparsity"][-1][1] == pytest.approx(pruner.sparsity)
    assert {tag for tag in found if tag.startswith("pruning/sparsity/")} == {
        "pruning/sparsity/0.weight",
        "pruning/sparsity/2.weight",
    }
    assert [step for step, _ in found["pruning/sparsity/0.weight"]] == [2, 3]  # when it was pruned


def test_numbers_reach_functions():
    seen = []
    pruner = train(lambda numbers, step: seen.append((step, numbers)), layers=False, prefix="")
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert seen[-1][1] == {"loss": 0.25, "sparsity": pruner.sparsity}


def test_layers_add_up_to_the_whole():
    seen = {}
    pruner = train(lambda numbers, step: seen.update(numbers))
    sizes = {name: mask.numel() for name, mask in pruner.masks.items()}
    pruned = sum(size * seen[f"pruning/sparsity/{name}"] for name, size in sizes.items())
    assert pruned / sum(sizes.values()) == pytest.approx(pruner.sparsity)


def test_other_trackers_are_refused():
    with pytest.raises(ArgumentTypeError, match=r"SummaryWriter or a function .* got int"):
        train(3)
