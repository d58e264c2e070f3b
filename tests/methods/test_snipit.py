"""SNIP-it against explicit gates, the published loop and its schedule."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from tests.contracts.state import unchanged
from tests.methods.sensitivity_cases import calibration_on, chain, conv_net, data_for
from tests.references.sensitivity import gate_gradients, ones_like, published_snipit, weights_of
from torchprune_bayes import Calibration, GradualPruner, bake, masks_of, prune_global
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.methods import SNIPit
from torchprune_bayes.params import prunable_parameters
from torchprune_bayes.schedules import halving

CASES = {
    "linear": (lambda: chain(5, 7, 3), (12, 5)),
    "convolutions": (conv_net, (9, 2, 5, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_elasticities_of_explicit_gates(case):
    make, shape = CASES[case]
    model, data = make().eval(), data_for(*shape, classes=3)
    decision = prune_global(
        None, SNIPit, amount=1, calibration=calibration_on(model, data), start=1.0
    )
    plain = make().eval()
    weights = weights_of(plain)
    exact = gate_gradients(plain, cross_entropy, *data, weights, ones_like(weights))
    loss = cross_entropy(plain(data[0]), data[1]).detach()
    for name, gradient in exact.items():
        expected = (gradient / (loss + 1e-8)).abs()
        torch.testing.assert_close(decision.scores[name], expected, rtol=1e-10, atol=1e-14)


def test_signed_sensitivities_sum_to_the_same_in_every_layer():
    # For activations of degree one each layer's gates scale the logits alike.
    model, data = chain(5, 8, 6, 3, bias=False), data_for(20, 5, classes=3)
    weights = weights_of(model)
    found = gate_gradients(model, cross_entropy, *data, weights, ones_like(weights))
    gradient = calibration_on(model, data).mean_gradient()
    sums = [float((weights[name] * gradient[name]).sum()) for name in weights]
    assert sums == pytest.approx([float(gate.sum()) for gate in found.values()], rel=1e-10)
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-10)


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (0.98, [0.5, 0.74, 0.86, 0.92, 0.95, 0.965, 0.98]),
        (0.93, [0.5, 0.715, 0.8225, 0.87625, 0.903125, 0.9165625, 0.93]),
        (0.5, [0.5]),
        (0.3, [0.3]),
    ],
)
def test_the_steps_follow_the_published_table(final, expected):
    model = chain(50, 40, 20)
    calibration = calibration_on(model, data_for(9, 50, classes=20))
    decision = prune_global(None, SNIPit, amount=final, calibration=calibration)
    total = 50 * 40 + 40 * 20
    assert [step["kept"] for step in decision.info["steps"]] == [
        total - round(total * sparsity) for sparsity in expected
    ]


@pytest.mark.parametrize("limit", [0.7, 0.93, 0.98])
@pytest.mark.parametrize("make", [lambda: chain(16, 30, 10), lambda: conv_net(seed=3)])
def test_compat_gives_the_masks_of_the_published_loop(make, limit):
    model = make().eval()
    shape = (15, 16) if isinstance(model[0], nn.Linear) else (15, 2, 5, 5)
    data = data_for(*shape, classes=3)
    options = {"calibration": calibration_on(model, data), "compat": "paper"}
    found = prune_global(None, SNIPit, amount=limit, **options).masks
    expected = published_snipit(make().eval(), *data, limit, steps=5)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compat_takes_the_logits_of_mappings_too():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = chain(16, 30, 10)

        def forward(self, x, labels=None):
            logits = self.inner(x)
            loss = None if labels is None else cross_entropy(logits, labels)
            return type("Output", (), {"loss": loss, "logits": logits})()

    x, y = data_for(15, 16, classes=10)
    calibration = Calibration(Classifier(), [{"x": x, "labels": y}])
    found = prune_global(None, SNIPit, amount=0.9, calibration=calibration, compat="paper").masks
    expected = published_snipit(chain(16, 30, 10), x, y, 0.9, steps=5)
    assert all(torch.equal(found[f"inner.{name}"], expected[name]) for name in expected)


@pytest.mark.parametrize(("compat", "kept"), [(None, 23_859), ("paper", 23_858)])
def test_the_published_network_keeps_the_published_count(compat, kept):
    model = chain(784, 512, 512, 512, 512, 10).float()
    x, y = data_for(8, 784, classes=10)
    calibration = Calibration(model, [(x.float(), y)], cross_entropy)
    decision = prune_global(None, SNIPit, amount=0.98, calibration=calibration, compat=compat)
    assert sum(int(mask.sum()) for mask in decision.masks.values()) == kept


def test_a_second_call_prunes_what_is_left():
    model, data = chain(16, 30, 10), data_for(15, 16, classes=10)
    calibration = calibration_on(model, data)
    first = prune_global(None, SNIPit, amount=0.8, calibration=calibration)
    second = prune_global(None, SNIPit, amount=0.5, calibration=calibration)
    assert [step["kept"] for step in first.info["steps"]][-1] == 156
    kept = [step["kept"] for step in second.info["steps"]]
    assert kept[-1] == 78
    assert max(kept) < 156  # steps below the sparsity at the start are left out
    assert all(step["revived"] == 0 for step in second.info["steps"])
    assert not any((second.masks[name] & ~first.masks[name]).any() for name in first.masks)


def test_no_layer_is_emptied_unless_asked():
    model, data = chain(12, 40, 2), data_for(10, 12, classes=2)
    with torch.no_grad():
        model[0].weight.mul_(1e-6)  # the bias carries the signal, so this layer's scores are tiny
        model[0].bias.fill_(1.0)
    twin = copy.deepcopy(model)
    guarded = prune_global(
        None, SNIPit, amount=0.9, calibration=calibration_on(model, data), min_keep_per_tensor=2
    )
    bare = prune_global(
        None, SNIPit, amount=0.9, calibration=calibration_on(twin, data), min_keep_per_tensor=0
    )
    assert [int(mask.sum()) for mask in guarded.masks.values()] == [2, 54]
    assert [int(mask.sum()) for mask in bare.masks.values()] == [0, 56]


def test_the_hosts_call_prunes_98_percent_and_leaves_a_plain_model():
    model, data = chain(20, 100, 5), data_for(30, 20, classes=5)
    params = prunable_parameters(model)
    calibration = calibration_on(model, data)
    prune.global_unstructured(params, pruning_method=SNIPit, amount=0.98, calibration=calibration)
    assert sum(int((module.weight != 0).sum()) for module, _ in params) == 50
    assert torch.equal(pickle.loads(pickle.dumps(model))(data[0]), model(data[0]))
    reloaded = chain(20, 100, 5, seed=7)
    reloaded.load_state_dict(bake(model).state_dict())
    assert torch.equal(reloaded(data[0]), model(data[0]))


def test_scoring_leaves_everything_as_it_was():
    model, data = conv_net().train(), data_for(9, 2, 5, 5, classes=3)
    cross_entropy(model(data[0]), data[1]).backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    calibration = calibration_on(model, data)
    with unchanged(model, optimizer):
        SNIPit(0.9, calibration=calibration).decide(calibration.space)


def test_each_step_takes_a_fresh_draw():
    model, (x, y) = chain(6, 9, 3), data_for(64, 6, classes=3)
    drawn = []

    class Shuffled:
        def __iter__(self):
            order = torch.randperm(len(y))[:16]
            drawn.append(order.tolist())
            yield x[order], y[order]

    calibration = Calibration(model, Shuffled(), cross_entropy, num_samples=16)
    prune_global(None, SNIPit, amount=0.9, calibration=calibration, steps=3)
    # Five draws, and one more to see whether the data shuffle.
    assert len({tuple(order) for order in drawn}) == 6


@pytest.mark.parametrize("mode", ["zeros", "hooks"])
def test_during_training_one_ranking_per_event(mode):
    model, (x, y) = chain(10, 30, 4).float(), data_for(40, 10, classes=4)
    x, delay, frequency = x.float(), 2, 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = GradualPruner(
        None,
        SNIPit,
        halving(0.9, begin=delay + frequency, every=frequency, steps=2),
        calibration=Calibration(model, [(x, y)], cross_entropy),
        optimizer=optimizer,
        mode=mode,
        steps=0,
    )
    earlier = pruner.masks
    for _ in range(16):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        assert not any((pruner.masks[n] & ~earlier[n]).any() for n in earlier)
        earlier = pruner.masks
    assert [event["step"] for event in pruner.history] == [5, 8, 11, 14]
    assert [event["sparsity"] for event in pruner.history] == [0.5, 0.7, 0.8, 0.9]
    assert all(len(event["info"][0]["steps"]) == 1 for event in pruner.history)
    assert pruner.finished


def test_apply_prunes_one_tensor():
    model, data = chain(6, 10, 3), data_for(12, 6, classes=3)
    SNIPit.apply(model[0], "weight", amount=0.9, calibration=calibration_on(model, data))
    assert {name: int(mask.sum()) for name, mask in masks_of(model).items()} == {"0.weight": 6}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": -1}, "`steps` of at least 0"),
        ({"path": "geometric", "steps": 0}, "`steps` of at least 1"),
        ({"path": "square"}, "`path` to be one of"),
        ({"start": 1.5}, "`start` in"),
        ({"min_keep_per_tensor": -1}, "min_keep_per_tensor"),
        ({"compat": "original"}, "`compat` to be one of"),
    ],
)
def test_refuses_impossible_options(options, match):
    with pytest.raises(ArgumentError, match=match):
        SNIPit(0.5, **options)


def test_refuses_amounts_of_other_tensors():
    model, data = chain(6, 10, 3), data_for(12, 6, classes=3)
    calibration = calibration_on(model, data)
    method = SNIPit({"0.weight": 3}, calibration=calibration, scope="layer")
    with unchanged(model), pytest.raises(ArgumentError, match=r"amounts for 0\.weight, 2\.weight"):
        method.decide(calibration.space)


def test_needs_data():
    with pytest.raises(ArgumentTypeError, match="calibration="):
        prune_global(None, SNIPit, amount=0.5)
