import sys

import pytest
import torch

from torchprune_bayes import Calibration
from torchprune_bayes.cli.digits import CalibrationDigits, load_digits, network, trained_network
from torchprune_bayes.errors import MissingExtraError
from torchprune_bayes.reports import evaluate


def test_the_three_parts_hold_every_image_once():
    digits = load_digits()
    parts = (digits.train, digits.validation, digits.test)
    images = torch.cat([part.inputs.flatten(1) for part in parts])
    assert images.shape == (1797, 64)
    assert float(images.min()) == 0.0
    assert float(images.max()) == 1.0
    # The published set has no two equal images, so overlap would show.
    assert len(images.unique(dim=0)) == 1797


def test_every_part_has_all_ten_digits():
    digits = load_digits()
    for part in (digits.train, digits.validation, digits.test):
        assert part.labels.unique().tolist() == list(range(10))


def test_batches_are_all_images_in_order():
    test = load_digits().test
    batches = test.batches(200)
    assert [len(labels) for _, labels in batches] == [200, 200, 97]
    assert torch.equal(torch.cat([inputs for inputs, _ in batches]), test.inputs)


def test_a_trained_network_is_right_and_repeatable():
    before = torch.get_rng_state()
    model, again, other = trained_network(0), trained_network(0), trained_network(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluate(model, load_digits().test.batches()).accuracy > 0.93
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model[0].weight, other[0].weight)


def test_gradients_come_from_training_images_and_held_out_loss_from_validation_images():
    digits, model = load_digits(), network()
    calibration = Calibration(
        model, CalibrationDigits(digits, 300), torch.nn.functional.cross_entropy, num_samples=300
    )
    drawn = torch.cat([inputs for inputs, _ in calibration.batches()]).flatten(1)
    train = {tuple(image) for image in digits.train.inputs.flatten(1).tolist()}
    assert len(drawn) == 300
    assert all(tuple(image) in train for image in drawn.tolist())
    held_out = calibration.held_out_loss()
    expected = evaluate(model, digits.validation.batches()).nll
    assert (held_out.samples, held_out.in_sample) == (300, False)
    assert held_out.value == pytest.approx(expected, rel=1e-5)


def test_the_draw_follows_the_seed_of_the_calibration():
    data, loss = CalibrationDigits(load_digits(), 16), torch.nn.functional.cross_entropy
    draws = [
        torch.cat(
            [
                labels
                for _, labels in Calibration(network(), data, loss, None, 16, 1, seed).batches()
            ]
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    load_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn .*\.\[cli\]"):
        load_digits()
