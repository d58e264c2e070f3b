"""One gate: what it multiplies by, at which granularity, and what closes it."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.gates import NoiseGate


def wide(units: int = 3, **options) -> NoiseGate:
    return NoiseGate(units, mu=-1.0, log_sigma=0.5, **options)


def distinct(values: torch.Tensor) -> int:
    return len(values.detach().unique())


@pytest.mark.parametrize(
    ("noise", "draws"), [("example", 4 * 3), ("batch", 3), ("element", 4 * 3 * 25), ("none", 1)]
)
def test_how_many_draws_there_are(noise, draws):
    torch.manual_seed(0)
    found = wide(dim=1, noise=noise)(torch.ones(4, 3, 5, 5))
    assert found.shape == (4, 3, 5, 5)
    assert distinct(found) == draws


@pytest.mark.parametrize(("noise", "draws"), [("example", 2 * 3), ("batch", 3), ("element", 60)])
def test_tokens_share_the_draws_of_their_example_and_heads_those_of_their_features(noise, draws):
    torch.manual_seed(0)
    found = wide(repeat=2, noise=noise)(torch.ones(2, 5, 6))
    assert distinct(found) == draws
    if noise != "element":
        assert torch.equal(found[..., 0::2], found[..., 1::2])


def test_the_elements_of_a_head_belong_to_its_gate():
    gate = wide(repeat=2, noise="element")
    gate.close(torch.tensor([False, True, False]))
    found = gate(torch.ones(2, 5, 6))
    assert not found[..., 2:4].any()
    assert found[..., [0, 1, 4, 5]].all()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("noise", ["example", "batch", "element"])
def test_dimensions_of_size_one_are_kept(shape, noise):
    assert wide(dim=1, noise=noise)(torch.ones(shape)).shape == shape
    assert NoiseGate(1, dim=1, noise=noise)(torch.ones(4, 1, 5, 5)).shape == (4, 1, 5, 5)


def test_a_vector_without_a_batch_gets_one_draw_per_unit():
    assert wide(noise="example")(torch.ones(3)).shape == (3,)


def test_the_mean_is_what_training_averages_to():
    torch.manual_seed(0)
    gate = wide(noise="example")
    found = gate(torch.ones(100_000, 3)).detach().double()
    error = found.std(0) / len(found) ** 0.5
    expected = gate.eval()(torch.ones(1, 3)).detach().double()
    assert ((found.mean(0) - expected).abs() < 4.5 * error).all()


def test_closed_gates_stay_closed_unless_regrowth_is_asked_for():
    gate = NoiseGate(3)
    assert gate.close(torch.tensor([True, False, False])) == 1
    assert gate.close(torch.tensor([False, True, False])) == 2
    assert gate.close(torch.tensor([False, False, True]), regrow=True) == 1
    assert gate.mask.tolist() == [True, True, False]


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=5))
def test_masks_are_monotone(history):
    gate = NoiseGate(4)
    for pruned in history:
        before = gate.mask.clone()
        gate.close(torch.tensor(pruned))
        assert not (gate.mask & ~before).any()


def test_closed_gates_are_zero_and_cost_nothing():
    gate = wide()
    gate.close(torch.tensor([False, True, False]))
    x = torch.ones(2, 3)
    for _ in range(2):
        assert not gate(x)[:, 1].any()
        assert gate(x)[:, [0, 2]].all()
        gate.eval()
    assert float(gate.kl()[1].detach()) == 0.0
    assert gate.kl()[0] > 0


def test_first_values_are_those_of_the_paper():
    gate = NoiseGate(1)
    assert float(gate.kl().detach()) == pytest.approx(7.26994092, rel=1e-8)
    assert float(gate.scale().detach()) == pytest.approx(0.994646515, rel=1e-8)


def test_gradients_reach_every_open_gate_and_no_closed_one():
    gate = wide()
    gate.close(torch.tensor([False, True, False]))
    (gate(torch.randn(4, 3)).square().sum() + gate.kl().sum()).backward()
    for parameter in (gate.mu, gate.log_sigma):
        assert parameter.grad is not None
        assert (parameter.grad != 0).tolist() == [True, False, True]


def test_projection_brings_parameters_back():
    gate = NoiseGate(2)
    with torch.no_grad():
        gate.mu.copy_(torch.tensor([0.3, -25.0]))
        gate.log_sigma.copy_(torch.tensor([9.0, -30.0]))
    gate.project_()
    assert gate.mu.tolist() == [0.0, -20.0]
    assert gate.log_sigma.tolist() == [5.0, -20.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_activations_keep_their_dtype(dtype):
    gate = wide()
    assert gate(torch.ones(2, 3, dtype=dtype)).dtype == dtype
    assert gate.posterior.mu.dtype == torch.float64


def test_copies_and_checkpoints():
    gate = wide()
    gate.close(torch.tensor([False, True, False]))
    buffer = io.BytesIO()
    torch.save(gate.state_dict(), buffer)
    buffer.seek(0)
    other = NoiseGate(3)
    other.load_state_dict(torch.load(buffer))
    for found in (other, copy.deepcopy(gate)):
        assert torch.equal(found.eval()(torch.ones(1, 3)), gate.eval()(torch.ones(1, 3)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"units": 0}, ArgumentError, "`units` of at least 1"),
        ({"repeat": 1.5}, ArgumentTypeError, "`repeat` to be an int"),
        ({"noise": "token"}, ArgumentError, "`noise` to be one of"),
        ({"mu": 1.0}, ArgumentError, "between them"),
        ({"low": -1.0, "high": -2.0, "mu": -1.5}, ArgumentError, "`low` < `high`"),
    ],
)
def test_impossible_arguments(options, error, message):
    with pytest.raises(error, match=message):
        NoiseGate(**{"units": 3, **options})


def test_misshapen_tensors():
    with pytest.raises(ArgumentError, match=r"Expected 3 entries .* shape \(2, 4\)"):
        NoiseGate(3)(torch.ones(2, 4))
    with pytest.raises(ArgumentError, match="boolean tensor of shape"):
        NoiseGate(3).close(torch.ones(3))


def test_other_bounds():
    gate = NoiseGate(1, low=-math.log(256), high=0.5, mu=0.4, log_sigma=1.0)
    theta = gate(torch.ones(1000, 1)).detach()
    assert float(theta.min()) >= 1 / 256 - 1e-6
    assert float(theta.max()) <= math.exp(0.5) + 1e-6
