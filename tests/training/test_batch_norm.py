from __future__ import annotations

import random
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

from torchprune_bayes import prune_global
from torchprune_bayes.errors import ArgumentError, CalibrationError
from torchprune_bayes.training import reestimate_batch_norm

Batches = list[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    """Convolution, norm, dropout, linear, norm; modes and momenta are mixed on purpose."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4)
    )
    model.append(nn.BatchNorm1d(4, momentum=None))
    model.train()
    model[1].eval()
    model[3].eval()
    return model


def data(batches: int = 3) -> Batches:
    return [(torch.randn(5 + i, 2, 4, 4) + i, torch.zeros(5 + i)) for i in range(batches)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_statistics_equal_a_computation_by_hand() -> None:
    model, batches = network(), data()
    reestimate_batch_norm(model, batches)
    inputs = [model[0](x) for x, _ in batches]
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, variances)
    # The second norm sees what the first gives in training, normalised by the batch itself.
    first = [(x - x.mean((0, 2, 3), keepdim=True)) for x in inputs]
    first = [
        x / (x.transpose(0, 1).flatten(1).var(1, unbiased=False) + 1e-5).sqrt().view(-1, 1, 1)
        for x in first
    ]
    hidden = [model[4](x.flatten(1)) for x in first]
    torch.testing.assert_close(
        model[5].running_mean, torch.stack([x.mean(0) for x in hidden]).mean(0)
    )
    torch.testing.assert_close(
        model[5].running_var, torch.stack([x.var(0) for x in hidden]).mean(0)
    )


def test_agrees_with_torch_where_there_is_no_dropout() -> None:
    model, batches = network(), data()
    model[2] = nn.Identity()
    other = deepcopy(model)
    reestimate_batch_norm(model, batches)
    update_bn(batches, other)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_only_statistics_change() -> None:
    model = network()
    model(data(1)[0][0]).sum().backward()
    before, gradients = state(model), [p.grad for p in model.parameters()]
    copies = [gradient.clone() for gradient in gradients if gradient is not None]
    modes = [module.training for module in model.modules()]
    reestimate_batch_norm(model, data())
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {
        f"{layer}.{what}"
        for layer in (1, 5)
        for what in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert modes == [module.training for module in model.modules()]
    assert (model[1].momentum, model[5].momentum) == (0.1, None)
    assert all(
        p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True)
    )
    assert all(map(torch.equal, copies, [g for g in gradients if g is not None]))


def test_random_states_stay_and_results_repeat() -> None:
    x = torch.randn(40, 2, 4, 4)
    loader = DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=8, shuffle=True)
    model = network()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        reestimate_batch_norm(model, loader, num_batches=2)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        results.append(state(model))
    assert all(results[0][name].equal(value) for name, value in results[1].items())


def test_statistics_are_those_before_if_a_batch_fails() -> None:
    model = network()
    before, modes = state(model), [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [*data(), (torch.randn(4, 9, 4, 4), torch.zeros(4))])
    with pytest.raises(CalibrationError, match="at least one batch, got none"):
        reestimate_batch_norm(model, [])
    with pytest.raises(ArgumentError, match="`num_batches` of at least 1, got 0"):
        reestimate_batch_norm(model, data(), num_batches=0)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert (model[1].momentum, model[5].momentum) == (0.1, None)


class Named(nn.Module):
    """Takes what a Hugging Face collator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, values: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.norm(values)


X = torch.tensor([[1.0, 2.0], [3.0, 6.0]])


@pytest.mark.parametrize(
    "batches",
    [
        [{"values": X, "labels": torch.zeros(2)}],
        [({"values": X}, torch.zeros(2))],
        [[X, torch.zeros(2)]],
        [((X, None), torch.zeros(2))],
        [X],
        (X for _ in range(5)),
    ],
    ids=["mapping", "mapping-and-target", "list", "arguments", "input", "generator"],
)
def test_kinds_of_batches(batches: Iterable[Any]) -> None:
    model = Named()
    reestimate_batch_norm(model, batches, num_batches=2)
    assert model.norm.running_mean is not None
    assert model.norm.running_var is not None
    assert model.norm.running_mean.tolist() == [2.0, 4.0]
    assert model.norm.running_var.tolist() == [2.0, 8.0]


def test_no_more_than_num_batches_are_drawn() -> None:
    batches = iter(data(5))
    model = network()
    reestimate_batch_norm(model, batches, num_batches=2)
    assert model[1].num_batches_tracked == 2
    assert len(list(batches)) == 3


def test_layers_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2))
    before = state(model)
    reestimate_batch_norm(model, [X])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_model_pruned_by_the_host_stays_copyable() -> None:
    model = network()
    prune_global([(model[0], "weight")], "magnitude", amount=0.5)
    with torch.no_grad():
        model(data(1)[0][0])
    reestimate_batch_norm(nn.DataParallel(model), data())
    assert all(map(torch.equal, deepcopy(model).buffers(), model.buffers()))
