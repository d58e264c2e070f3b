import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from torchprune_bayes import Calibration, EmpiricalFisher, WoodFisher
from torchprune_bayes.methods.greedy_obs import GreedyOBS


def calibration_of(seed=0, **options):
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    data = [(torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator))]
    return Calibration(model, data, cross_entropy, num_samples=48, **options)


def rise(calibration, decision, block_size):
    fisher = EmpiricalFisher(block_size=block_size, damping=0.01).fit(calibration)
    flat = fisher.remaining.gather(calibration.space.values()).double()
    step = fisher.remaining.gather(decision.updates).double() - flat
    return fisher.quadratic(step) + 0.5 * 0.01 * float(step.square().sum())


@pytest.mark.parametrize("block_size", [8, "tensor", "full"])
def test_masks_of_a_larger_amount_lie_within_those_of_a_smaller(block_size):
    options = {"block_size": block_size, "damping": 0.01}
    kept = []
    for amount in (10, 20, 40):
        calibration = calibration_of()
        method = GreedyOBS(amount, calibration=calibration, **options)
        masks = method.decide(calibration.space).masks
        kept.append(torch.cat([mask.flatten() for mask in masks.values()]))
        assert int((~kept[-1]).sum()) == amount
    assert not (kept[1] & ~kept[0]).any()
    assert not (kept[2] & ~kept[1]).any()


def test_predicted_loss_is_lower_than_after_ranking_once():
    options = {"block_size": "full", "damping": 0.01, "update_scale": 1.0}
    rises = {"greedy": 0.0, "once": 0.0}
    for seed in range(10):
        calibration = calibration_of(seed)
        methods = {
            "greedy": GreedyOBS(0.7, calibration=calibration, **options),
            "once": WoodFisher(0.7, calibration=calibration, stages=1, **options),
        }
        for name, method in methods.items():
            rises[name] += rise(calibration, method.decide(calibration.space), "full")
    assert rises["greedy"] < rises["once"]


def test_works_through_the_hosts_door():
    calibration = calibration_of()
    prune.global_unstructured(calibration.pairs(), GreedyOBS, amount=0.5, calibration=calibration)
    masks = [module.weight_mask for module, _ in calibration.pairs()]
    assert sum(int(mask.sum()) for mask in masks) == 45 - round(45 / 2)
