"""SNIP and iterative SNIP against explicit gates and their schedule."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.methods.sensitivity_cases import calibration_on, chain, conv_net, data_for
from tests.references.sensitivity import gate_gradients, ones_like, weights_of
from torchprune_bayes import prune_global
from torchprune_bayes.errors import ArgumentTypeError, CalibrationError
from torchprune_bayes.methods import SNIP, IterativeSNIP


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda: chain(5, 7, 3), (12, 5)), (conv_net, (9, 2, 5, 5))]
)
def test_scores_are_shares_of_the_gradients_of_explicit_gates(make, shape):
    model, data = make().eval(), data_for(*shape, classes=3)
    weights = weights_of(model)
    exact = gate_gradients(model, cross_entropy, *data, weights, ones_like(weights))
    total = sum(gradient.abs().sum() for gradient in exact.values())
    decision = prune_global(None, SNIP, amount=0.5, calibration=calibration_on(model, data))
    for name, gradient in exact.items():
        torch.testing.assert_close(
            decision.scores[name], gradient.abs() / total, rtol=1e-10, atol=1e-15
        )
    assert float(sum(score.sum() for score in decision.scores.values())) == pytest.approx(1.0)
    kept = torch.cat([score[decision.masks[name]] for name, score in decision.scores.items()])
    gone = torch.cat([score[~decision.masks[name]] for name, score in decision.scores.items()])
    assert kept.min() >= gone.max()


def test_each_step_keeps_the_same_share():
    model, data = chain(16, 30, 10), data_for(15, 16, classes=10)
    decision = prune_global(
        None, IterativeSNIP, amount=0.9, calibration=calibration_on(model, data), steps=4
    )
    kept = [step["kept"] for step in decision.info["steps"]]
    assert kept == [780 - round(780 * (1 - 0.1 ** (t / 4))) for t in (1, 2, 3, 4)]


def test_steps_are_snip_on_what_the_last_one_left():
    model, twin = chain(16, 30, 10), chain(16, 30, 10)
    data = data_for(15, 16, classes=10)
    found = prune_global(
        None, IterativeSNIP, amount=0.75, calibration=calibration_on(model, data), steps=2
    )
    calibration = calibration_on(twin, data)  # its data do not depend on the seed
    prune_global(None, SNIP, amount=390, calibration=calibration)
    expected = prune_global(None, SNIP, amount=195, calibration=calibration)
    assert all(torch.equal(found.masks[name], mask) for name, mask in expected.masks.items())


def test_one_step_is_snip():
    data, options = data_for(15, 16, classes=10), {"amount": 0.8}
    first, second = chain(16, 30, 10), chain(16, 30, 10)
    one = prune_global(None, SNIP, calibration=calibration_on(first, data), **options)
    same = prune_global(
        None, IterativeSNIP, calibration=calibration_on(second, data), steps=1, **options
    )
    assert all(torch.equal(same.masks[name], mask) for name, mask in one.masks.items())


def test_by_layer_each_tensor_reaches_its_share():
    model, data = chain(16, 30, 10), data_for(15, 16, classes=10)
    decision = prune_global(
        None,
        IterativeSNIP,
        amount=0.9,
        calibration=calibration_on(model, data),
        steps=3,
        scope="layer",
    )
    assert [int(mask.sum()) for mask in decision.masks.values()] == [48, 30]


def test_a_network_without_gradients_is_refused():
    model, data = chain(4, 6, 3), data_for(5, 4, classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(CalibrationError, match="zeros alone"):
        prune_global(None, SNIP, amount=24, calibration=calibration_on(model, data))


def test_needs_data():
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, SNIP, amount=0.5)
