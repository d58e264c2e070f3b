"""Where nothing can be decided there is an error, where something is left out a warning."""

from __future__ import annotations

import math
import warnings
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from tests.calibration.cases import collected, mlp, mlp_calibration, mlp_data
from tests.contracts.cases import calibration_of
from tests.contracts.cases import mlp as small_mlp
from tests.contracts.state import unchanged
from torchprune_bayes import Calibration, prune_global, registered_methods
from torchprune_bayes.errors import CalibrationError, CalibrationWarning


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    """InfoNCE of a batch with itself: constant for one sample."""
    found = normalize(output, dim=-1)
    return cross_entropy(found @ found.T / 0.1 + 0 * target.sum(), torch.arange(len(output)))


def clip(output: Tensor, target: Tensor) -> Tensor:
    scores = normalize(output, dim=-1) @ torch.eye(output.shape[1]).to(output)[target].T
    labels = torch.arange(len(output))
    return (cross_entropy(scores, labels) + cross_entropy(scores.T, labels)) / 2


SILENT = {
    "constant": lambda output, target: 0 * output.sum(),
    "detached": lambda output, target: cross_entropy(output.detach(), target),
    "all ignored": lambda output, target: cross_entropy(output, torch.full_like(target, -100)),
    "contrastive": contrastive,
    "clip": clip,
}


@pytest.mark.parametrize("vectorize", ["auto", False])
@pytest.mark.parametrize("loss", SILENT)
def test_gradients_that_are_all_zero_are_refused(loss: str, vectorize: Any) -> None:
    calibration = mlp_calibration(loss_fn=SILENT[loss], vectorize=vectorize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # of a loss that compares samples
        with pytest.raises(
            CalibrationError, match=r"zeros alone in all 12: .*`mini_batch`|got none by"
        ):
            collected(calibration)
    if loss in ("constant", "detached", "all ignored"):
        with pytest.raises(CalibrationError, match="zeros alone in the mean"):
            calibration.mean_gradient()


@pytest.mark.parametrize("loss", [contrastive, clip])
def test_mini_batches_give_losses_that_compare_samples_something_to_say(loss: Any) -> None:
    calibration = mlp_calibration(loss_fn=loss, mini_batch=6)
    assert collected(calibration).any(dim=1).all()


@pytest.mark.parametrize(
    "name", [name for name, method in registered_methods().items() if method.needs_calibration]
)
def test_no_method_decides_by_a_loss_that_says_nothing(name: str) -> None:
    model = small_mlp()
    calibration = calibration_of(model).with_loss(lambda output, target: 0 * output.sum())
    if name in ("alps", "sparsegpt", "synflow", "wanda"):
        return  # looks at no loss
    with unchanged(model), pytest.raises(CalibrationError):
        prune_global(None, name, amount=0.5, calibration=calibration)


@given(zeros=st.integers(0, 12))
@settings(max_examples=13, deadline=None)
def test_gradients_that_are_mostly_zero_are_warned_of(zeros: int) -> None:
    data = mlp_data((12,))
    data[0][1][:zeros] = -100
    calibration = mlp_calibration(data=data)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if zeros == 12:
            with pytest.raises(CalibrationError, match="zeros alone"):
                collected(calibration)
            return
        collected(calibration)
        collected(calibration)
    expected = [f"{zeros} of 12 gradients are exactly zero"] if zeros >= 6 else []
    found = [str(warning.message) for warning in seen]
    assert len(found) == len(expected)
    assert all(text in message for text, message in zip(expected, found, strict=True))


# Held-out losses


def held_out(bad: list[int], value: float = math.nan, samples: int = 60) -> Calibration:
    """Half of the samples are held out; of those some have inputs without a finite loss."""
    data = mlp_data((samples,))
    for index in bad:
        data[0][0][samples // 2 + index, 0] = value
    return mlp_calibration(data=data, num_samples=samples // 2)


@given(bad=st.lists(st.integers(0, 29), unique=True, max_size=29))
@settings(max_examples=20, deadline=None)
def test_held_out_samples_without_a_finite_loss_are_left_out_with_a_warning(
    bad: list[int],
) -> None:
    calibration = held_out(bad)
    good = [index for index in range(30, 60) if index - 30 not in bad]
    inputs, labels = mlp_data((60,))[0]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = calibration.held_out_loss()
        again = calibration.held_out_loss()
    model = calibration.model.eval()
    expected = cross_entropy(model(inputs[good]), labels[good]).detach()
    assert found == again
    assert (found.samples, found.in_sample) == (30 - len(bad), False)
    assert math.isclose(found.value, float(expected), rel_tol=1e-9)
    messages = [str(warning.message) for warning in seen]
    assert [m.startswith(f"Left {len(bad)} of 30 held-out") for m in messages] == [True][: len(bad)]


def test_held_out_samples_without_any_finite_loss_are_refused() -> None:
    with pytest.raises(CalibrationError, match="none on 30 held-out samples"):
        held_out(list(range(30))).held_out_loss()


def test_weights_without_a_finite_loss_have_an_infinite_one_and_cost_no_samples() -> None:
    calibration = held_out([])
    plain = calibration.held_out_loss()
    broken = {name: value * math.nan for name, value in calibration.space.values().items()}
    found = calibration.held_out_loss(broken)
    assert (found.value, found.samples) == (math.inf, 30)
    assert calibration.held_out_loss() == plain


def test_samples_that_are_both_are_measured_alike() -> None:
    data = mlp_data((6,))
    data[0][0][2, 0] = math.nan
    calibration = mlp_calibration(data=data)
    with pytest.warns(CalibrationWarning, match="Left 1 of 6 calibration samples"):
        found = calibration.held_out_loss()
    assert (found.samples, found.in_sample) == (5, True)


@pytest.mark.parametrize("method", ["woodfisher", "cbs"])
def test_one_sample_without_a_loss_does_not_decide(method: str) -> None:
    def pruned(calibration: Calibration) -> tuple[float, dict[str, Any]]:
        decision = prune_global(None, method, amount=0.6, calibration=calibration)
        inputs, labels = mlp_data((60,))[0]
        loss = cross_entropy(calibration.model(inputs), labels)
        return float(loss.detach()), decision.info

    good, _ = pruned(held_out([]))
    with pytest.warns(CalibrationWarning, match="Left 1 of 30"):
        found, info = pruned(held_out([7]))
    assert found < 1.1 * good
    assert not any(
        isinstance(v, float) and math.isnan(v) for s in info["steps"] for v in s.values()
    )


# What is the loss of a batch


def samples_of(outputs: int = 3) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 5), torch.arange(16) % outputs
    return nn.Linear(5, outputs).double(), [(inputs.double(), labels)]


def warned(loss: Any, **options: Any) -> list[str]:
    model, data = samples_of()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        collected(Calibration(model, data, loss, **options))
    return [str(warning.message) for warning in seen]


@given(weights=st.tuples(*[st.floats(0.05, 20.0)] * 3))
@settings(max_examples=25, deadline=None)
def test_class_weights_that_single_samples_lose_are_warned_of(
    weights: tuple[float, float, float],
) -> None:
    weight = torch.tensor(weights, dtype=torch.float64)
    found = warned(lambda output, target: cross_entropy(output, target, weight=weight))
    largest = max(weights) / min(weights)
    if largest < 1.9:
        assert not found
    if all(max(a, b) > 2.1 * min(a, b) for a, b in combinations(weights, 2)):
        assert len(found) == 1
        assert "raise `mini_batch`" in found[0]
        assert "reduction='sum'" in found[0]


def test_a_sum_over_the_number_of_samples_keeps_class_weights() -> None:
    weight = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target, weight=weight, reduction="sum") / len(target)

    assert not warned(summed)
    model, data = samples_of()
    plain = collected(Calibration(model, data, cross_entropy))
    kept = collected(Calibration(model, data, summed))
    torch.testing.assert_close(kept, plain * weight[data[0][1]].unsqueeze(1))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, t: cross_entropy(o, t, reduction="sum"), "is the sum"),
        (lambda o, t: cross_entropy(o, t) + o.square().mean(0).sum().log(), "is not the mean"),
        (lambda o, t: cross_entropy(o - 0.9 * o.mean(0), t), "is not the mean"),
    ],
)
def test_losses_that_are_no_mean_are_warned_of_once(loss: Any, message: str) -> None:
    found = warned(loss)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        lambda o, t: mse_loss(o, torch.eye(3)[t].to(o)),
        lambda o, t: cross_entropy(o, t, label_smoothing=0.1),
        lambda o, t: cross_entropy(o, t, weight=torch.tensor([1.0, 1.5, 1.2]).to(o)),
        nn.MultiMarginLoss(),
    ],
)
def test_means_over_samples_are_not_warned_of(loss: Any) -> None:
    assert not warned(loss)
    assert not warned(loss, mini_batch=4)


def test_large_mini_batches_are_taken_as_they_are() -> None:
    weight = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    assert not warned(lambda o, t: cross_entropy(o, t, weight=weight), mini_batch=8)


def test_a_model_is_as_it_was_after_all_checks() -> None:
    model = mlp()
    with unchanged(model):
        collected(mlp_calibration(model))
        mlp_calibration(model, num_samples=6).held_out_loss()
