import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.calibration.cases import (
    CLASSES,
    Pair,
    collected,
    conv_data,
    conv_net,
    mlp,
    mlp_calibration,
    mlp_data,
)
from tests.contracts.state import unchanged
from torchprune_bayes import Calibration
from torchprune_bayes.errors import CalibrationWarning


class Noisy(nn.Module):
    """Draws random numbers in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + torch.rand(CLASSES)


class Growing:
    """Data that are not the same on a second pass."""

    def __init__(self, step: float) -> None:
        self.step, self.passes = step, 0

    def __iter__(self) -> Iterator[Pair]:
        self.passes += 1
        for inputs, labels in mlp_data():
            yield inputs + self.step * self.passes, labels


def test_deterministic_models_and_data_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for calibration in (
            mlp_calibration(),
            Calibration(conv_net(), conv_data(), cross_entropy),
            mlp_calibration(data=iter(mlp_data())),
        ):
            first = collected(calibration)
            calibration.mean_gradient()
            assert torch.equal(collected(calibration), first)


@pytest.mark.parametrize("mini_batch", [1, 2])
def test_a_model_that_draws_random_numbers_is_warned_about_once(mini_batch: int) -> None:
    torch.manual_seed(0)
    model = Noisy().double()
    calibration = mlp_calibration(model, mini_batch=mini_batch)
    message = r"The model is not deterministic: the loss .* changed by \d\.\de[-+]\d+ \(from"
    with unchanged(model), pytest.warns(CalibrationWarning, match=message):
        first = collected(calibration)
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(collected(calibration), first)  # each pass has the same seed
        calibration.mean_gradient()
        calibration.held_out_loss()
        collected(calibration.reseeded(1))


def test_data_that_change_are_warned_about_with_the_size_of_the_change() -> None:
    calibration = mlp_calibration(mlp(), data=Growing(0.5), num_samples=12)
    with pytest.warns(CalibrationWarning, match="The data is not deterministic") as caught:
        collected(calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collected(calibration)  # once is enough
    size = re.search(r"changed by (\S+) ", str(caught[0].message))
    assert size is not None
    first, second = (
        float(calibration.loss(None, (x[:1] + 0.5 * k, y[:1])))
        for k, (x, y) in enumerate([mlp_data()[0]] * 2, start=1)
    )
    assert float(size[1]) == pytest.approx(abs(second - first), rel=0.06)


def test_data_that_change_are_found_by_passes_over_batches_too() -> None:
    calibration = mlp_calibration(data=Growing(0.5), num_samples=12)
    list(calibration.batches())
    with pytest.warns(CalibrationWarning, match="The data is not deterministic"):
        calibration.mean_gradient()


def test_other_draws_are_not_taken_for_changed_data() -> None:
    dataset = torch.utils.data.TensorDataset(*mlp_data((40,))[0])
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    calibration = mlp_calibration(data=loader, num_samples=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in (0, 1, 0):
            collected(calibration.reseeded(seed))


def test_the_check_can_be_left_out() -> None:
    calibration = mlp_calibration(
        Noisy().double(), data=Growing(0.5), num_samples=12, check_deterministic=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collected(calibration)
        collected(calibration)


def test_a_loss_that_is_not_a_number_is_not_taken_for_a_random_one() -> None:
    data = mlp_data()
    data[0][1][0] = -100  # the first sample alone has no label at all
    calibration = mlp_calibration(data=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not collected(calibration)[0].any()
