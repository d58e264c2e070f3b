"""Whatever a calibration does or fails at, the model and all generators stay as they were."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from tests.calibration.cases import (
    CLASSES,
    Pair,
    Sequential,
    collected,
    conv_data,
    conv_net,
    mlp,
    mlp_calibration,
    mlp_data,
)
from tests.contracts.state import snapshot, unchanged
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes.errors import CalibrationError, ParameterError

USES: dict[str, Callable[[Calibration], Any]] = {
    "gradients": collected,
    "mean_gradient": Calibration.mean_gradient,
    "batches": lambda calibration: list(calibration.batches()),
    "fisher_batches": lambda calibration: list(calibration.fisher_batches()),
    "loss": lambda calibration: calibration.loss(None, next(calibration.batches())),
    "held_out_loss": Calibration.held_out_loss,
}


def trained(model: Sequential, data: list[Pair]) -> Sequential:
    """With gradients, modes of its own in places, a frozen part and a half-pruned history."""
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    cross_entropy(model(data[0][0]), data[0][1]).backward()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fisher", ["empirical", "true"])
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_a_pass_leaves_everything_as_it_was(use: str, fisher: str, vectorize: bool | str) -> None:
    model = trained(conv_net(), conv_data())
    with unchanged(model):
        USES[use](
            Calibration(model, conv_data(), cross_entropy, fisher=fisher, vectorize=vectorize)
        )


@pytest.mark.parametrize("stream", ["gradients", "batches", "fisher_batches"])
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_everything_is_as_it_was_between_the_rows_too(stream: str, vectorize: bool | str) -> None:
    model = trained(conv_net(), conv_data())
    calibration = Calibration(model, conv_data(), cross_entropy, fisher="true", vectorize=vectorize)
    before = snapshot(model)
    for _ in getattr(calibration, stream)():
        assert snapshot(model) == before
        assert torch.is_grad_enabled()
    assert snapshot(model) == before


def test_a_pass_that_is_left_half_way_leaves_everything_as_it_was() -> None:
    model = trained(conv_net(), conv_data())
    calibration = Calibration(model, conv_data(), cross_entropy, vectorize=False)
    with unchanged(model):
        closed, forgotten = calibration.gradients(), calibration.gradients()
        next(closed)
        next(forgotten)  # still suspended when the states are compared
        del closed


def test_two_passes_at_once_do_not_disturb_each_other() -> None:
    model = trained(conv_net(), conv_data())
    calibration = Calibration(model, conv_data(), cross_entropy, vectorize=False)
    alone = collected(calibration)
    with unchanged(model):
        both = list(zip(calibration.gradients(), calibration.gradients(), strict=True))
    assert torch.equal(torch.cat([one for one, _ in both]), alone)
    assert torch.equal(torch.cat([other for _, other in both]), alone)


class Failing(nn.Module):
    """Fails at a large input, after it has drawn a random number."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)
        self.error = error

    def forward(self, inputs: Tensor) -> Tensor:
        if bool((inputs > 50).any()):
            torch.rand(1)
            raise self.error("stop")
        return self.layer(inputs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("use", [name for name in USES if name != "batches"])
def test_an_error_in_the_model_leaves_everything_as_it_was(
    use: str, error: type[BaseException]
) -> None:
    data = mlp_data((4, 4))
    data[0][0][2, 0] = 99.0
    model = Failing(error).double()
    calibration = mlp_calibration(model, data=data, fisher="true")
    with unchanged(model), pytest.raises(error, match="stop") as caught:
        USES[use](calibration)
    assert caught.value.__traceback__ is not None  # which keeps every frame alive until here


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("use", USES)
def test_an_error_in_the_data_leaves_everything_as_it_was(
    use: str, error: type[BaseException]
) -> None:
    class Broken:
        def __iter__(self) -> Iterator[Pair]:
            yield mlp_data()[0]
            torch.rand(1)
            raise error("disk")

    model = trained(mlp(), mlp_data())
    calibration = mlp_calibration(model, data=Broken(), num_samples=12)
    with unchanged(model), pytest.raises(error, match="disk") as caught:
        USES[use](calibration)
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize("vectorize", ["auto", False])
def test_gradients_that_are_not_finite_leave_everything_as_it_was(vectorize: bool | str) -> None:
    data = conv_data()
    model = trained(conv_net(), data)
    data[1][0][0] = math.nan
    with unchanged(model), pytest.raises(CalibrationError, match="finite"):
        collected(Calibration(model, data, cross_entropy, vectorize=vectorize))


@pytest.mark.parametrize(
    "options",
    [{"data": []}, {"num_samples": 99}, {"data": [{"x": 1}]}, {"loss_fn": None}],
    ids=["no batches", "too few", "no tensors", "no loss"],
)
@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_unusable_data_leave_everything_as_it_was(options: dict[str, Any], fisher: str) -> None:
    model = trained(mlp(), mlp_data())
    with unchanged(model), pytest.raises((CalibrationError, TypeError)):
        collected(mlp_calibration(model, fisher=fisher, **options))


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[1].weight = model[0].weight
    return model


def _parametrized() -> Sequential:
    model = mlp()
    parametrizations.weight_norm(model[0])
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, str]], str]] = {
    "tied": (_tied, [(0, "weight"), (1, "weight")], "got `0.weight` again as `1.weight`"),
    "twice": (mlp, [(0, "weight"), (0, "weight")], "got `0.weight` again as `0.weight`"),
    "missing": (mlp, [(1, "weight")], "Expected a parameter `1.weight`, got none in Tanh"),
    "parametrized": (_parametrized, [(0, "weight")], "got the parametrized `0.weight`"),
}


@pytest.mark.parametrize(("make", "places", "message"), REFUSED.values(), ids=REFUSED)
def test_tensors_that_cannot_be_pruned_are_refused_and_nothing_changes(
    make: Callable[[], nn.Module], places: list[tuple[int, str]], message: str
) -> None:
    model = make()
    params = [(model.get_submodule(str(number)), name) for number, name in places]
    with unchanged(model), pytest.raises(ParameterError, match=message):
        Calibration(model, mlp_data(), cross_entropy, params)


def test_a_tensor_of_another_model_is_refused_and_nothing_changes() -> None:
    model = mlp()
    with unchanged(model), pytest.raises(ParameterError, match="a Linear that is not in it"):
        Calibration(model, mlp_data(), cross_entropy, prunable_parameters(mlp()))


def test_the_data_themselves_are_not_changed() -> None:
    data = mlp_data()
    collected(mlp_calibration(data=data, fisher="true"))
    for batch, expected in zip(data, mlp_data(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))
