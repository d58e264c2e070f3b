"""Training gates: the scale of the penalty, when gates close, checkpoints, and other machinery."""

from __future__ import annotations

import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from tests.gates.cases import mlp, scatter
from tests.integrations.processes import in_two_processes
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.gates import Gates, attach_gates, gates_of
from torchprune_bayes.training import GateTraining, gate_parameter_groups


def gated(**options) -> tuple[nn.Module, Gates]:
    torch.manual_seed(0)
    model = mlp()
    return model, attach_gates(model, **options)


def data(samples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 6, generator=generator)
    return x, x[:, :3].argmax(1)


def train(
    model: nn.Module, training: GateTraining, steps: int, lr: float = 0.02, **autocast
) -> None:
    optimizer = torch.optim.Adam(gate_parameter_groups(model, lr))
    x, y = data()
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
            loss = cross_entropy(model(x), y)
        (loss + training.penalty()).backward()
        optimizer.step()
        training.step()


def test_scales_of_the_penalty():
    model, gates = gated()
    total = float(gates.kl().detach())
    for options, expected in [
        ({"data_size": 50}, total / 50),
        ({"kl": "sum"}, total),
        ({"kl": 0.25}, total * 0.25),
        ({"kl": "mean"}, total / 9),  # 5 and 4 equal gates, so 7.27
    ]:
        found = GateTraining(model, **options).penalty()
        assert found.dtype == torch.float32
        assert float(found.detach()) == pytest.approx(expected, rel=1e-6)


def test_the_penalty_grows_while_it_is_annealed():
    model, _ = gated()
    full = float(GateTraining(model, kl="sum").penalty().detach())
    training = GateTraining(model, kl="sum", anneal_steps=4)
    shares = []
    for _ in range(6):
        shares.append(float(training.penalty().detach()) / full)
        training.step()
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_units_that_the_data_do_not_need_are_closed_and_the_others_are_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    gates = attach_gates(model)
    training = GateTraining(model, data_size=64, prune_every=None)
    train(model, training, 400)
    assert training.begin_finetuning() == gates.closed
    assert 4 <= gates.closed <= 14
    x, y = data()
    assert (model.eval()(x).argmax(1) == y).double().mean() > 0.85


def test_parameters_stay_in_their_box():
    model, gates = gated()
    training = GateTraining(model, kl=10.0)
    train(model, training, 30, lr=0.5)
    for gate in gates.values():
        assert -20 <= float(gate.mu.detach().min()) <= float(gate.mu.detach().max()) <= 0
        assert float(gate.log_sigma.detach().max()) <= 5


def test_when_gates_close():
    model, gates = gated()
    training = GateTraining(model, kl="mean", criterion="mean", prune_every=2)
    with torch.no_grad():
        gates["2:in"].mu[:2] = -20.0
    assert training.end_epoch()["pruned"] == 0
    assert training.end_epoch() == {
        "epoch": 2, "step": 0, "closed": 2, "pruned": 2, "metric": None,
    }  # fmt: skip
    with torch.no_grad():
        gates["4:in"].mu[0] = -20.0
    assert training.begin_finetuning() == 1
    with torch.no_grad():
        gates["4:in"].mu[1] = -20.0
    assert [training.end_epoch()["closed"] for _ in range(3)] == [3, 3, 3]


def test_pruning_only_before_finetuning_and_with_a_cap():
    model, gates = gated()
    with torch.no_grad():
        gates["2:in"].mu.fill_(-20.0)
    training = GateTraining(model, kl="mean", criterion="mean", prune_every=None, amount=3)
    assert training.end_epoch()["pruned"] == 0
    assert training.begin_finetuning() == 3


def test_the_cap_is_not_spent_twice_at_the_same_step():
    model, gates = gated()
    with torch.no_grad():
        gates["2:in"].mu.fill_(-20.0)
    training = GateTraining(model, kl="mean", criterion="mean", prune_every=1, amount=2)
    assert training.end_epoch()["pruned"] == 2
    assert training.begin_finetuning() == 0
    assert gates.closed == 2


def test_the_best_of_each_phase():
    model, _ = gated()
    training = GateTraining(model, kl="mean", prune_every=None)
    with pytest.raises(ArgumentError, match="Expected a metric"):
        training.restore_best()
    for metric in (0.3, 0.9, 0.6):
        with torch.no_grad():
            model[0].bias.fill_(metric)
        training.end_epoch(metric)
    assert training.best_metric == 0.9
    assert training.restore_best() == 0.9
    assert torch.equal(model[0].bias, torch.full((5,), 0.9))
    training.begin_finetuning()
    assert training.best_metric is None
    training.end_epoch(0.1)
    assert training.best_metric == 0.1


def test_going_on_from_a_checkpoint():
    model, _ = gated()
    training = GateTraining(model, kl="sum", anneal_steps=10)
    train(model, training, 3)
    training.end_epoch(0.5)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), training.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer)
    other, _ = gated()
    other.load_state_dict(weights)
    resumed = GateTraining(other, kl="sum", anneal_steps=10)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.penalty(), training.penalty())
    assert resumed.history == training.history
    assert resumed.best_metric == 0.5
    resumed.restore_best()
    with pytest.raises(ArgumentError, match="Expected the keys"):
        resumed.load_state_dict({"step": 3})


def test_gates_learn_faster_and_do_not_decay():
    model, gates = gated()
    weights, ours = gate_parameter_groups(model, 1e-3, multiplier=5, weight_decay=0.1)
    assert (weights["lr"], weights["weight_decay"]) == (1e-3, 0.1)
    assert (ours["lr"], ours["weight_decay"]) == (5e-3, 0.0)
    assert {id(p) for p in ours["params"]} == {id(p) for p in gates.parameters()}
    assert len(weights["params"]) + len(ours["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("noise", ["example", "batch", "element", "none"])
def test_mixed_precision(noise):
    model, gates = gated(noise=noise)
    training = GateTraining(model, data_size=64)
    train(model, training, 5, autocast=True)
    for parameter in gates.parameters():
        assert parameter.dtype == torch.float32
        assert torch.isfinite(parameter).all()
        assert parameter.grad is not None
        assert parameter.grad.any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ArgumentTypeError, "`data_size` for kl='elbo'"),
        ({"data_size": 0}, ArgumentError, "`data_size` of at least 1"),
        ({"kl": "max"}, ArgumentError, "`kl` to be one of"),
        ({"kl": -1.0}, ArgumentError, "`kl` to be positive"),
        ({"kl": "sum", "prune_every": 0}, ArgumentError, "`prune_every`"),
        ({"kl": "sum", "anneal_steps": -1}, ArgumentError, "`anneal_steps`"),
        ({"kl": "sum", "criterion": "l1"}, ArgumentError, "Expected one of snr"),
    ],
)
def test_impossible_arguments(options, error, message):
    with pytest.raises(error, match=message):
        GateTraining(gated()[0], **options)


def test_a_model_without_gates():
    with pytest.raises(ArgumentError, match="got none"):
        GateTraining(mlp(), kl="sum")


def _worker() -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = mlp()
    attach_gates(model)
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(rank)  # every rank draws its own noise
    training = GateTraining(wrapped, data_size=64, criterion="mean")
    optimizer = torch.optim.Adam(gate_parameter_groups(wrapped, 0.05))
    x, y = (part[rank::2] for part in data())
    for _ in range(5):
        optimizer.zero_grad()
        (cross_entropy(wrapped(x), y) + training.penalty()).backward()
        optimizer.step()
        training.step()
    if rank == 0:  # the others hear of it through the buffers
        gates_of(wrapped)["2:in"].close(torch.arange(5) == 2)
    wrapped(x)
    state = [tensor.double() for tensor in model.state_dict().values()]
    flat = torch.cat([tensor.flatten() for tensor in state])
    found = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(found, flat)
    assert torch.equal(found[0], found[1])
    assert not gates_of(model)["2:in"].mask[2]


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_stay_equal():
    in_two_processes(_worker)


def test_the_gradient_of_the_penalty_is_that_of_the_kl():
    model, gates = gated()
    scatter(gates)
    GateTraining(model, kl=2.0).penalty().backward()
    found = [parameter.grad.clone() for parameter in gates.parameters()]
    expected = torch.autograd.grad(2.0 * gates.kl(), gates.parameters())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
