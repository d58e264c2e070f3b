import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from torchprune_bayes import bake
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError
from torchprune_bayes.reports import ResultsTable, evaluate_attacked, plot_attacked
from torchprune_bayes.reports.robustness import ATTACKS

pytest.importorskip("foolbox")


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))


def images(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.3 + 0.4 * torch.rand(count, 3, 2, 2, generator=generator)
    return pixels, torch.randint(2, (count,), generator=generator)


def accuracies(table, model="m"):
    return [row["accuracy"] for row in table if row["model"] == model]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 100), epsilon=st.floats(0.001, 0.2))
def test_fgsm_on_a_linear_model_is_its_margin(seed, epsilon):
    model, (pixels, labels) = linear(seed), images(seed=seed)
    weight = model[1].weight[1] - model[1].weight[0]
    with torch.no_grad():
        logits = model(pixels)
        margin = (logits[:, 1] - logits[:, 0]) * (2 * labels - 1)
        stays = margin > epsilon * weight.abs().sum()
        unsure = (margin - epsilon * weight.abs().sum()).abs() < 1e-4
    found = accuracies(
        evaluate_attacked({"m": model}, [(pixels, labels)], attack="fgsm", epsilons=[epsilon])
    )
    assert found[0] == pytest.approx(float((margin > 0).double().mean()))
    slack = float(unsure.double().mean()) + 1e-9
    assert abs(found[1] - float(stays.double().mean())) <= slack


@pytest.mark.parametrize("attack", sorted(set(ATTACKS) - {"carlini-wagner"}))
def test_accuracy_never_rises_with_the_strength_and_nothing_changes(attack):
    model, batches = linear(), [images(16)]
    model[1].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    epsilons = [0.01, 0.3, 3.0]
    found = accuracies(evaluate_attacked({"m": model}, batches, attack=attack, epsilons=epsilons))
    assert found == sorted(found, reverse=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].weight.grad, torch.ones(2, 12))
    assert (model[1].weight.requires_grad, model[1].bias.requires_grad) == (True, False)
    assert all(module.training for module in model.modules())


def test_masked_and_baked_models_are_attacked_alike():
    model, baked = linear(), linear()
    for one in (model, baked):
        prune.l1_unstructured(one[1], "weight", amount=0.5)
    bake(baked)
    table = evaluate_attacked({"masked": model, "baked": baked}, [images()], epsilons=[0.05])
    assert accuracies(table, "masked") == accuracies(table, "baked")
    assert model[1].weight_orig.requires_grad


def test_normalised_images_are_attacked_in_units_of_the_pixels():
    (pixels, labels), mean, std = images(), [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    model = linear()

    class Whole(nn.Module):
        def forward(self, inputs):
            return model((inputs - shift) / scale)

    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    whole = Whole()
    whole.model = model
    plain = evaluate_attacked({"m": whole}, [(pixels, labels)], attack="fgsm")
    normalised = [((pixels - shift) / scale, labels)]
    table = evaluate_attacked({"m": model}, normalised, attack="fgsm", mean=mean, std=std)
    assert accuracies(table) == accuracies(plain)


def test_outputs_with_logits_and_a_share_of_the_samples():
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, inputs):
            return type("Output", (), {"logits": self.inner(inputs)})()

    pixels, labels = images(30)
    batches = list(zip(pixels.split(8), labels.split(8), strict=True))
    rows = list(evaluate_attacked({"m": Output()}, batches, num_samples=11, epsilons=[0.1]))
    assert [row["samples"] for row in rows] == [11, 11]
    assert [row["epsilon"] for row in rows] == [0.0, 0.1]


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        (images(), {"attack": "magic"}, ArgumentError, "`attack` to be one of"),
        (images(), {"options": {"stps": 3}}, ArgumentError, "Expected `options` of Linf"),
        (images(), {"bounds": (0, 0.5)}, ArgumentError, r"pixels in `bounds` \[0, 0.5\]"),
        (images(), {"mean": [0.1, 0.2]}, ArgumentError, "`mean` of one or 3 channels, got 2"),
        ({"input_ids": torch.ones(2)}, {}, ArgumentTypeError, "not texts or tables"),
        ((images()[0], torch.ones(24)), {}, ArgumentTypeError, "one integer label"),
    ],
)
def test_wrong_arguments(batch, options, error, message):
    with pytest.raises(error, match=message):
        evaluate_attacked({"m": linear()}, [batch], **options)


def test_without_foolbox_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "foolbox", None)
    with pytest.raises(ArgumentError.__mro__[1], match=r'pip install "\.\[attacks\]"'):
        evaluate_attacked({"m": linear()}, [images()])


def test_a_plot_needs_rows(tmp_path):
    with pytest.raises(ArgumentError, match="rows of `evaluate_attacked`"):
        plot_attacked(ResultsTable(), tmp_path / "attacked.svg")
