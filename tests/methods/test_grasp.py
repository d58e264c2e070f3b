"""GraSP against the Hessian written out and finite differences, and its sign."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn.functional import cross_entropy, mse_loss

from tests.contracts.state import unchanged
from tests.methods.sensitivity_cases import calibration_on, chain, conv_net, data_for
from tests.references.sensitivity import flat_loss, gradient_flow
from torchprune_bayes import Calibration, prune_global
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.methods import GraSP

CASES = {
    "linear": (lambda: chain(5, 7, 3), (70, 5)),  # more samples than fit in one batch
    "convolutions": (conv_net, (9, 2, 5, 5)),
}


def tempered(temperature: float):
    return lambda output, target: cross_entropy(output / temperature, target)


def flat(scores: dict[str, Tensor]) -> Tensor:
    return torch.cat([score.flatten() for score in scores.values()])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_scores_are_those_of_the_whole_hessian(case, temperature):
    make, shape = CASES[case]
    model, data = make().eval(), data_for(*shape, classes=3)
    vector, loss = flat_loss(model, tempered(temperature), *data)
    gradient = torch.autograd.functional.jacobian(loss, vector)
    expected = vector * (hessian(loss, vector) @ gradient)
    calibration = calibration_on(make(), data)
    scores = prune_global(
        None, GraSP, amount=1, calibration=calibration, temperature=temperature
    ).scores
    torch.testing.assert_close(flat(scores), expected, rtol=1e-9, atol=expected.abs().max() * 1e-12)


def test_scores_are_half_the_slope_of_the_gradient_flow():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = data_for(12, 4, classes=3)
    vector, loss = flat_loss(model, cross_entropy, *data)
    calibration = calibration_on(model, data)
    found = GraSP(1, calibration=calibration, temperature=1.0).decide(calibration.space).scores
    assert found is not None
    scores = flat(found)
    step = 1e-5
    for index in range(0, len(vector), 5):
        moved = torch.zeros_like(vector)
        moved[index] = step * vector[index]  # along the gate of one weight
        rise = gradient_flow(loss, vector + moved) - gradient_flow(loss, vector - moved)
        assert float(scores[index]) == pytest.approx(float(rise / (4 * step)), rel=1e-5, abs=1e-9)


def test_removes_what_feeds_the_gradient_least():
    # A quadratic loss of independent weights: removing one changes the squared norm of the gradient
    # by an amount that can be written down, and first order is enough for the order.
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, -0.1, 0.05]]))
    x = torch.eye(3, dtype=torch.float64)
    target = torch.tensor([[-1.0], [-1.0], [-1.0]], dtype=torch.float64)
    calibration = Calibration(model, [(x, target)], mse_loss)
    vector, loss = flat_loss(model, mse_loss, x, target)

    def without(index: int) -> float:
        left = vector.clone()
        left[index] = 0.0
        return float(gradient_flow(loss, left))

    decision = GraSP(1, calibration=calibration, temperature=1.0).decide(calibration.space)
    assert decision.scores is not None
    assert max(range(3), key=without) == 1
    assert decision.masks["weight"].tolist() == [[True, False, True]]
    order = sorted(range(3), key=without, reverse=True)
    assert decision.scores["weight"][0].argsort().tolist() == order


def test_the_gradient_of_dead_weights_does_not_count():
    model, data = chain(5, 7, 3), data_for(20, 5, classes=3)
    calibration = calibration_on(model, data)
    first = prune_global(None, GraSP, amount=0.5, calibration=calibration, temperature=1.0)
    mask = flat(first.masks)
    vector, loss = flat_loss(chain(5, 7, 3), cross_entropy, *data)
    left = vector * mask
    gradient = torch.autograd.functional.jacobian(loss, left)
    expected = left * (hessian(loss, left) @ (mask * gradient))
    second = prune_global(None, GraSP, amount=0.5, calibration=calibration, temperature=1.0)
    torch.testing.assert_close(flat(second.scores), expected, rtol=1e-9, atol=1e-14)
    assert int(flat(second.masks).sum()) == 14


def test_several_steps_reach_the_count():
    model, data = chain(16, 30, 10), data_for(15, 16, classes=10)
    decision = prune_global(
        None, GraSP, amount=0.9, calibration=calibration_on(model, data), steps=3
    )
    assert decision.info["steps"][-1]["kept"] == 78


def test_a_loss_that_is_linear_in_the_weights_scores_zero():
    model, data = nn.Linear(3, 1).double(), data_for(5, 3, classes=2)
    calibration = Calibration(model, [data], lambda output, target: output.mean())
    decision = prune_global(None, GraSP, amount=1, calibration=calibration)
    assert not decision.scores["weight"].any()


def test_attention_has_second_derivatives():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 2)).double()
    data = data_for(4, 3, 8, classes=2)
    calibration = Calibration(model, [data], cross_entropy)
    scores = GraSP(0.5, calibration=calibration).decide(calibration.space).scores
    assert scores is not None
    assert all(score.any() for score in scores.values())


def test_deciding_changes_nothing():
    model, data = conv_net().train(), data_for(9, 2, 5, 5, classes=3)
    cross_entropy(model(data[0]), data[1]).backward()
    calibration = calibration_on(model, data)
    with unchanged(model):
        GraSP(0.5, calibration=calibration).decide(calibration.space)


class WithOwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, x: Tensor, labels: Tensor):
        logits = self.inner(x)
        return type("Output", (), {"loss": cross_entropy(logits, labels), "logits": logits})()


def test_a_model_with_its_own_loss_has_no_temperature():
    model, (x, y) = WithOwnLoss(), data_for(6, 4, classes=3)
    calibration = Calibration(model, [{"x": x, "labels": y}])
    decision = prune_global(None, GraSP, amount=6, calibration=calibration)
    assert int(decision.masks["inner.weight"].sum()) == 6
    with unchanged(model), pytest.raises(ArgumentError, match="computes its own loss"):
        prune_global(None, GraSP, amount=1, calibration=calibration, temperature=200.0)


def test_refuses_an_impossible_temperature():
    with pytest.raises(ArgumentError, match="`temperature` to be positive"):
        GraSP(0.5, temperature=0.0)


def test_needs_data():
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, GraSP, amount=0.5)
