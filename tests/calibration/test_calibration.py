import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import prune

from tests.calibration.cases import (
    CASES,
    CLASSES,
    DataFactory,
    ModelFactory,
    assert_same,
    collected,
    conv_data,
    conv_net,
    mlp,
    mlp_calibration,
    mlp_data,
)
from tests.references.gradients import per_sample_loop
from torchprune_bayes import Calibration, prunable_parameters
from torchprune_bayes._numerics.remaining_vector import RemainingVector
from torchprune_bayes.errors import (
    AlignmentError,
    ArgumentError,
    ArgumentTypeError,
    CalibrationError,
    ParameterError,
)

# Gradients


@pytest.mark.parametrize("vectorize", ["auto", True, False])
@pytest.mark.parametrize(("make_model", "make_data"), CASES)
def test_gradients_are_those_of_a_backward_pass_per_sample(
    make_model: ModelFactory, make_data: DataFactory, vectorize: bool | str
) -> None:
    model, data = make_model(), make_data()
    params = prunable_parameters(model)
    calibration = Calibration(model, data, cross_entropy, params, vectorize=vectorize)
    found = collected(calibration)
    expected = per_sample_loop(model, data, cross_entropy, params)
    assert_same(found, expected)


def test_biases_and_a_part_of_the_weights_can_be_asked_for_in_any_order() -> None:
    model, data = mlp(), mlp_data()
    params = [(model[3], "weight"), (model[0], "bias")]
    found = collected(Calibration(model, data, cross_entropy, params))
    assert_same(found, per_sample_loop(model, data, cross_entropy, params))


def test_a_pruned_tensor_has_gradients_at_its_live_entries_only() -> None:
    model, data = mlp(), mlp_data()
    prune.l1_unstructured(model[0], "weight", amount=0.4)
    with torch.no_grad():
        model[0].weight_orig += 0.1 * (1 - model[0].weight_mask)  # as an optimizer moves them
    calibration = Calibration(model, data, cross_entropy, prunable_parameters(model))
    found = collected(calibration)
    kept = torch.cat([mask.flatten() for mask in calibration.space.masks().values()])
    expected = per_sample_loop(model, data, cross_entropy, calibration.pairs())
    assert found.shape[1] == int(kept.sum()) < kept.numel()
    assert_same(found, expected[:, kept])


def test_a_weight_that_the_loss_does_not_reach_has_a_gradient_of_zero() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, CLASSES), nn.Linear(5, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    for vectorize in (True, False):
        calibration = mlp_calibration(TwoHeads().double(), vectorize=vectorize)
        found = collected(calibration)
        assert found[:, : 5 * CLASSES].abs().max() > 0
        assert not found[:, 5 * CLASSES :].any()


def test_gradients_are_taken_at_the_weights_that_are_given() -> None:
    model, data = mlp(), mlp_data()
    calibration = mlp_calibration(model)
    weights = {name: 0.5 * value for name, value in calibration.space.values().items()}
    found = collected(calibration, weights=weights)
    with torch.no_grad():
        for tensor in calibration.space:
            tensor.leaf.mul_(0.5)
    expected = per_sample_loop(model, data, cross_entropy, calibration.pairs())
    assert_same(found, expected)


def test_weights_of_unknown_tensors_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"got 'fc\.weight'"):
        collected(mlp_calibration(), weights={"fc.weight": torch.zeros(1)})


@given(share=st.floats(0.0, 1.0), numbers=st.data())
@settings(max_examples=20, deadline=None)
def test_spans_of_the_remaining_vector_join_to_the_whole(
    share: float, numbers: st.DataObject
) -> None:
    calibration = mlp_calibration()
    source = torch.Generator().manual_seed(3)
    masks = {
        name: torch.rand(value.shape, generator=source) <= share
        for name, value in calibration.space.values().items()
    }
    masks["0.weight"][0, 0] = True
    remaining = RemainingVector(masks)
    whole = collected(calibration, remaining=remaining)
    cuts = numbers.draw(st.lists(st.integers(0, remaining.numel), max_size=3))
    edges = sorted({0, *cuts, remaining.numel})
    parts = [collected(calibration, remaining=remaining, span=span) for span in pairwise(edges)]
    assert_same(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("span", [(3, 3), (10**6, 10**6 + 1)])
def test_a_range_without_live_entries_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="remaining entries in the range"):
        collected(mlp_calibration(), span=span)


@pytest.mark.parametrize("mini_batch", [2, 4, 6])
def test_a_mini_batch_gives_the_mean_of_its_samples_wherever_the_batches_end(
    mini_batch: int,
) -> None:
    single = collected(mlp_calibration())
    calibration = mlp_calibration(mini_batch=mini_batch)
    found = collected(calibration)
    assert calibration.engine == "layers"
    assert len(found) == calibration.num_gradients == 12 // mini_batch
    assert_same(found, single.unflatten(0, (-1, mini_batch)).mean(1))


def test_the_mean_gradient_is_the_mean_of_all_gradients() -> None:
    calibration = mlp_calibration(num_samples=10)
    mean = calibration.mean_gradient()
    joined = torch.cat([mean[name].flatten() for name in calibration.space.names])
    assert_same(joined, collected(calibration).mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_inputs", [True, False])
def test_half_precision_models_are_differentiated_in_float32(
    dtype: torch.dtype, half_inputs: bool
) -> None:
    model, wide = conv_net().to(dtype), conv_net().to(dtype).float()
    inputs, labels = conv_data((6,))[0]
    inputs = inputs.to(dtype)
    found = collected(
        Calibration(model, [(inputs if half_inputs else inputs.float(), labels)], cross_entropy)
    )
    expected = collected(Calibration(wide, [(inputs.float(), labels)], cross_entropy))
    assert found.dtype == torch.float32
    assert_same(found, expected)


# Memory


@pytest.mark.parametrize("memory_mb", [0.001, 0.05, 0.2, 1024.0])
def test_rows_come_in_chunks_that_fit_the_memory_budget(memory_mb: float) -> None:
    calibration = mlp_calibration(data=mlp_data((200, 100)), memory_mb=memory_mb)
    rows = [len(part) for part in calibration.gradients()]
    assert calibration.engine == "layers"
    assert sum(rows) == 300
    assert max(rows) == 1 or max(rows) * calibration.space.numel * 8 <= memory_mb * 2**20 / 4
    if memory_mb > 1:
        assert max(rows) > 100


def test_activations_count_towards_the_memory_budget() -> None:
    def largest_chunk(pixels: int) -> int:
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        data = [(torch.randn(64, 1, pixels, pixels), torch.randint(2, (64,)))]
        calibration = Calibration(model, data, cross_entropy, memory_mb=1.0)
        return max(len(part) for part in calibration.gradients())

    assert largest_chunk(6) == 64
    assert 1 < largest_chunk(60) <= 2**20 / 4 / (2 * 58 * 58 * 4)


# Samples


def test_all_samples_are_used_unless_a_number_is_given() -> None:
    assert mlp_calibration().num_samples == 12
    assert mlp_calibration(num_samples=7).num_gradients == 7
    assert mlp_calibration(mini_batch=5).num_samples == 10  # incomplete mini-batches are left out


def test_batches_cover_the_calibration_samples_in_order() -> None:
    calibration = mlp_calibration(num_samples=9)
    inputs = torch.cat([batch[0] for batch in calibration.batches(size=2)])
    torch.testing.assert_close(inputs, torch.cat([x for x, _ in mlp_data()])[:9])
    assert max(len(batch[0]) for batch in calibration.batches(size=2)) == 2


def test_a_reseeded_calibration_draws_other_samples() -> None:
    dataset = torch.utils.data.TensorDataset(*mlp_data((40,))[0])
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    calibration = mlp_calibration(data=loader, num_samples=8)
    first, again = collected(calibration), collected(calibration)
    other = collected(calibration.reseeded(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(collected(mlp_calibration(data=loader, num_samples=8, seed=1)), other)


def test_further_draws_are_unrelated_to_those_of_neighbouring_seeds() -> None:
    calibrations = [mlp_calibration(seed=seed) for seed in range(3)]
    assert calibrations[0].redrawn(0) is calibrations[0]
    seeds = [calibration.redrawn(index).seed for calibration in calibrations for index in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert calibrations[1].redrawn(2).seed == calibrations[1].redrawn(2).seed


def test_a_restricted_calibration_keeps_one_tensor() -> None:
    model = mlp()
    calibration = mlp_calibration(model)
    whole = collected(calibration)
    found = collected(calibration.restricted(model[3], "weight"))
    torch.testing.assert_close(found, whole[:, -7 * CLASSES :])
    with pytest.raises(AlignmentError):
        calibration.restricted(model[0], "bias")


def test_tensors_of_another_model_are_refused() -> None:
    with pytest.raises(AlignmentError, match="of another"):
        mlp_calibration().with_space(mlp_calibration().space)


# Losses


def test_a_calibration_follows_the_model_to_another_type() -> None:
    model = mlp()
    calibration = mlp_calibration(model)
    assert collected(calibration).dtype == torch.float64
    model.float()
    data = [(inputs.float(), labels) for inputs, labels in mlp_data()]
    after = mlp_calibration(model, data=data)
    found = collected(after)
    assert (after.dtype, found.dtype, calibration.dtype) == (torch.float32,) * 3
    model.double()
    assert after.dtype == torch.float64


def test_layers_replaced_since_are_refused_by_every_pass() -> None:
    model = mlp()
    calibration = mlp_calibration(model)
    collected(calibration)
    model[3] = nn.Linear(7, CLASSES).double()
    for use in (collected, Calibration.mean_gradient, lambda c: list(c.batches())):
        with pytest.raises(AlignmentError, match="layer `3` that the model had"):
            use(calibration)


def test_another_loss_takes_the_same_samples() -> None:
    calibration = mlp_calibration()
    other = calibration.with_loss(lambda output, target: -2 * cross_entropy(output, target))
    assert calibration.loss_fn is not other.loss_fn
    for name, gradient in calibration.mean_gradient().items():
        torch.testing.assert_close(other.mean_gradient()[name], -2 * gradient)


def test_the_loss_can_be_differentiated_by_weights() -> None:
    calibration = mlp_calibration()
    leaves = {
        name: value.clone().requires_grad_() for name, value in calibration.space.values().items()
    }
    batch = next(calibration.batches())
    loss = calibration.loss(leaves, batch)
    found = torch.autograd.grad(loss, list(leaves.values()))
    rows = collected(calibration)[: len(batch[0])]
    assert_same(torch.cat([g.flatten() for g in found]), rows.mean(0))


def test_the_held_out_loss_is_of_the_samples_after_the_calibration_samples() -> None:
    model = mlp()
    found = mlp_calibration(model, num_samples=5).held_out_loss()
    inputs, labels = (torch.cat(parts) for parts in zip(*mlp_data(), strict=True))
    expected = cross_entropy(model.eval()(inputs[5:10]), labels[5:10]).detach()
    assert (found.samples, found.in_sample) == (5, False)
    assert math.isclose(found.value, float(expected), rel_tol=1e-12)


def test_the_held_out_loss_takes_what_is_left() -> None:
    found = mlp_calibration(num_samples=11).held_out_loss()
    assert (found.samples, found.in_sample) == (1, False)


def test_the_held_out_loss_says_when_no_samples_are_left() -> None:
    calibration = mlp_calibration()
    found = calibration.held_out_loss()
    losses = [
        float(calibration.loss(None, batch)) * len(batch[0]) for batch in calibration.batches()
    ]
    assert (found.samples, found.in_sample) == (12, True)
    assert math.isclose(found.value, sum(losses) / 12, rel_tol=1e-12)


def test_the_held_out_loss_keeps_no_more_samples_than_the_budget_allows() -> None:
    calibration = mlp_calibration(data=mlp_data((10,) * 100), num_samples=500, memory_mb=0.01)
    assert calibration.held_out_loss().samples * 6 * 8 <= 0.01 * 2**20 / 8


def test_the_held_out_loss_is_at_the_weights_that_are_given() -> None:
    calibration = mlp_calibration(num_samples=5)
    zeros = {name: torch.zeros_like(value) for name, value in calibration.space.values().items()}
    zeros_loss, own_loss = calibration.held_out_loss(zeros).value, calibration.held_out_loss().value
    bias = calibration.model.get_parameter("3.bias").detach()
    labels = torch.cat([y for _, y in mlp_data()])[5:10]
    assert math.isclose(zeros_loss, float(cross_entropy(bias.expand(5, -1), labels)), rel_tol=1e-12)
    assert zeros_loss != own_loss


# Refusals


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"mini_batch": 0}, ArgumentError, "`mini_batch` of at least 1"),
        ({"num_samples": 0}, ArgumentError, "`num_samples` of at least 1"),
        ({"num_samples": 10, "mini_batch": 4}, ArgumentError, "multiple of mini_batch=4"),
        ({"num_samples": 2.5}, ArgumentTypeError, "`num_samples` to be an int"),
        ({"seed": -1}, ArgumentError, "`seed` of at least 0"),
        ({"fisher": "exact"}, ArgumentError, "`fisher` to be one of"),
        ({"vectorize": "vmap"}, ArgumentError, "`vectorize` to be one of"),
        ({"memory_mb": 0}, ArgumentError, "`memory_mb` to be positive"),
        ({"data": 3}, ArgumentTypeError, "iterable of batches, got int"),
        ({"loss_fn": "mse"}, ArgumentTypeError, "`loss_fn` to be callable"),
        ({"params": []}, ParameterError, "at least one"),
    ],
)
def test_impossible_arguments_are_refused(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        mlp_calibration(**options)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"`model` to be an nn\.Module"):
        Calibration("resnet18", mlp_data(), cross_entropy)  # type: ignore[arg-type]


@pytest.mark.parametrize("fisher", ["empirical", "true"])
@pytest.mark.parametrize("vectorize", ["auto", False])
def test_fewer_samples_than_asked_are_an_error(fisher: str, vectorize: bool | str) -> None:
    calibration = mlp_calibration(num_samples=13, fisher=fisher, vectorize=vectorize)
    for use in (collected, Calibration.mean_gradient, lambda c: list(c.batches())):
        with pytest.raises(CalibrationError, match="Expected 13 calibration samples, got 12"):
            use(calibration)


@pytest.mark.parametrize("num_samples", [None, 5])
def test_data_without_batches_are_an_error(num_samples: int | None) -> None:
    with pytest.raises(CalibrationError, match="got 0"):
        collected(mlp_calibration(data=[], num_samples=num_samples))


def test_gradients_that_are_not_finite_are_an_error_that_names_the_tensors() -> None:
    data = mlp_data((6,))
    data[0][0][4, 0] = math.inf
    for vectorize in ("auto", False):
        calibration = mlp_calibration(data=data, vectorize=vectorize)
        with pytest.raises(CalibrationError, match=r"finite gradients, got .* in 0\.weight"):
            collected(calibration)
        with pytest.raises(CalibrationError, match="finite gradients"):
            calibration.mean_gradient()


def test_finite_gradients_with_an_overflowing_sum_are_no_error() -> None:
    model = nn.Linear(2, 1, bias=False)
    data = [(torch.tensor([[3e38, 3e38]]), torch.zeros(1, 1))]
    found = collected(Calibration(model, data, lambda output, target: output.sum() + target.sum()))
    assert_same(found, torch.tensor([[3e38, 3e38]]))


@pytest.mark.parametrize("loss_fn", [None, lambda output, target: output, lambda output, target: 1])
def test_a_loss_that_is_no_scalar_is_an_error(loss_fn: object) -> None:
    with pytest.raises(CalibrationError, match="one scalar loss per batch"):
        collected(mlp_calibration(loss_fn=loss_fn))


def test_errors_of_the_model_itself_are_passed_on() -> None:
    calibration = mlp_calibration(data=[(torch.randn(2, 99).double(), torch.tensor([0, 1]))])
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        collected(calibration)


def test_a_regression_loss_works() -> None:
    model = mlp()
    data = [(x, torch.randn(len(x), CLASSES, dtype=torch.float64)) for x, _ in mlp_data()]
    params = prunable_parameters(model)
    found = collected(Calibration(model, data, mse_loss, params))
    torch.testing.assert_close(found, per_sample_loop(model, data, mse_loss, params))
