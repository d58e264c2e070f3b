import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from torchprune_bayes import Calibration
from torchprune_bayes.cli._shrink_plan import estimate_shrinking
from torchprune_bayes.structured import shrink


def counting(samples):
    """A network and its data, and a list of how many samples each of its forward passes had."""
    layers = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    model, seen = nn.Sequential(*layers).eval(), []
    model[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 0].numel()))
    data = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(samples // 16)]
    return model, Calibration(model, data, cross_entropy), seen


@pytest.mark.parametrize("samples", [64, 640])
@pytest.mark.parametrize("evaluations", [4, 60])
def test_no_more_samples_run_than_planned(samples, evaluations):
    model, calibration, seen = counting(samples)
    plan = estimate_shrinking(calibration, evaluations)
    assert (plan.samples, plan.evaluations) == (samples, evaluations)
    assert plan.seconds > 0
    seen.clear()
    options = {"sparsity": 0.4, "evaluations": evaluations, "verify": False}
    shrink(model, torch.randn(2, 8), calibration, **options)
    # A gradient counts as three passes, and runs through the model once.
    assert 0.2 * plan.forward_samples < sum(seen) <= plan.forward_samples


def test_an_importance_of_the_weights_alone_takes_no_gradients():
    _, calibration, _ = counting(64)
    plan = estimate_shrinking(calibration, 0, scored_by_gradients=False)
    scored = estimate_shrinking(calibration, 0)
    assert (plan.gradients, scored.gradients) == (0, 64)
    assert scored.forward_samples - plan.forward_samples == 3 * 64


def test_evaluations_take_no_more_samples_than_there_are():
    for samples, evaluations, tried in [(96, 60, 96), (640, 60, 256), (640, 10, 512)]:
        assert estimate_shrinking(counting(samples)[1], evaluations).tried == tried
