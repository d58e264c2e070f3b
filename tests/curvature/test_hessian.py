from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention
from torch.nn.utils import prune

from tests.references.second_order import dense_hessian
from torchprune_bayes import Calibration
from torchprune_bayes.curvature import hessian_diagonal
from torchprune_bayes.errors import ArgumentError, ArgumentTypeError, CalibrationError


def _mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _data(samples: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def _calibration(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Calibration:
    return Calibration(model, [(x, y)], cross_entropy, **options)


def _flat(diagonal: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in diagonal.values()])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, -1)
        mixed = scaled_dot_product_attention(query, key, value).squeeze(1)
        logits: Tensor = self.out(self.norm(mixed)).mean(1)
        return logits


def _convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )


@pytest.mark.parametrize(
    ("build", "shape"),
    [(_mlp, (5,)), (_convolutional, (2, 4, 4)), (_Attention, (6, 4))],
    ids=["mlp", "convolutions", "attention"],
)
def test_equals_the_diagonal_of_the_dense_hessian(build: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = build().double().eval()
    x, y = _data(70, *shape)  # more than one batch
    calibration = _calibration(model, x, y)
    expected = dense_hessian(model, calibration.space.names, x, y, cross_entropy).diagonal()
    torch.testing.assert_close(_flat(hessian_diagonal(calibration)), expected)


def test_only_live_entries_are_probed_and_weights_can_be_given() -> None:
    model, (x, y) = _mlp(), _data(8, 5)
    names = ["0.weight", "2.weight"]
    new = {"0.weight": torch.ones(4, 5), "2.weight": torch.full((3, 4), 0.5)}
    masks = {"0.weight": torch.eye(4, 5).bool(), "2.weight": torch.zeros(3, 4).bool()}
    calibration = _calibration(model, x, y)
    for probes in (None, 3):
        found = hessian_diagonal(calibration, probes=probes, weights=new, masks=masks)
        assert not any(value[~masks[name]].any() for name, value in found.items())
    exact = hessian_diagonal(calibration, weights=new, masks=masks)["0.weight"].flatten()
    with torch.no_grad():
        model[0].weight.copy_(new["0.weight"])
        model[2].weight.copy_(new["2.weight"])
    dense = dense_hessian(model, names, x, y, cross_entropy).diagonal()[:20]
    torch.testing.assert_close(exact, dense * torch.eye(4, 5).flatten())


def test_one_probe_is_exact_for_a_diagonal_hessian() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model, (x, _) = Scales(), _data(8, 5)
    calibration = Calibration(model, [(x.float(), x.float())], mse_loss, params=[(model, "scale")])
    for probes in (None, 1):
        found = hessian_diagonal(calibration, probes=probes)["scale"]
        torch.testing.assert_close(found, 2 * x.square().mean(0) / 5, rtol=1e-5, atol=0)


def test_probes_have_the_mean_and_the_variance_of_hutchinson() -> None:
    model, (x, y) = _mlp(), _data(16, 5)
    calibration = _calibration(model, x, y)
    hessian = dense_hessian(model, calibration.space.names, x, y, cross_entropy)
    off_diagonal = hessian - torch.diag(hessian.diagonal())
    deviation = (off_diagonal.square().sum(1) / 400).sqrt()
    error = _flat(hessian_diagonal(calibration, probes=400)) - hessian.diagonal()
    standardised = error / deviation
    assert standardised.abs().max() < 5
    assert 0.5 < standardised.square().mean() < 2


def test_probes_do_not_depend_on_batches_or_memory() -> None:
    model, (x, y) = _mlp(), _data(100, 5)
    whole = _calibration(model, x, y)
    pieces = Calibration(
        model, list(zip(x.split(7), y.split(7), strict=True)), cross_entropy, memory_mb=1e-3
    )
    torch.testing.assert_close(
        hessian_diagonal(pieces, probes=20), hessian_diagonal(whole, probes=20)
    )


def test_probes_follow_the_seed_and_leave_the_generators_alone() -> None:
    model, (x, y) = _mlp(), _data(8, 5)
    state = torch.get_rng_state()
    first, again, other = (
        _flat(hessian_diagonal(_calibration(model, x, y, seed=seed), probes=2))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature() -> None:
    layer, (x, y) = nn.Linear(5, 3).double(), _data(4, 5)
    calibration = Calibration(layer, [(x, y)], lambda output, target: output.mean())
    for probes in (None, 2):
        assert not hessian_diagonal(calibration, probes=probes)["weight"].any()


def test_weights_that_are_not_reached_or_enter_linearly_have_zeros() -> None:
    model, (x, y) = _mlp(), _data(4, 5)
    model.add_module("unused", nn.Identity())
    model.unused.layer = nn.Linear(2, 2).double()
    calibration = Calibration(model, [(x, y)], lambda output, target: output.sum())
    for probes in (None, 2):
        found = hessian_diagonal(calibration, probes=probes)
        assert found["0.weight"].all()
        assert not found["unused.layer.weight"].any()
    assert not hessian_diagonal(calibration)["2.weight"].any()


class _Cube(torch.autograd.Function):
    """A cube whose derivative is a function of our own as well, see below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        square: Tensor = _Square.apply(x)
        return 3 * square * gradients[0]


class _Square(torch.autograd.Function):
    """A square whose backward pass looks at values, which vmap refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0] if gradients[0].any() else torch.zeros_like(x)


class _Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        cubes: Tensor = _Cube.apply(self.layer(x))
        return cubes


def test_products_are_taken_one_by_one_where_vmap_fails(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, (x, y) = _Cubed().double(), _data(8, 5)
    calibration = _calibration(model, x, y)
    expected = dense_hessian(model, ["layer.weight"], x, y, cross_entropy).diagonal()
    with caplog.at_level("INFO", "torchprune_bayes"):
        torch.testing.assert_close(_flat(hessian_diagonal(calibration)), expected)
    assert "vmap fails" in caplog.text


def test_works_on_pruned_models_without_gradients_around() -> None:
    model, (x, y) = _mlp(), _data(8, 5)
    prune.l1_unstructured(model[0], "weight", 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        found = hessian_diagonal(_calibration(model.train(), x, y))["0.weight"]
    assert torch.equal(found != 0, model[0].weight_mask.bool())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refuses_too_many_weights_for_the_exact_diagonal_only() -> None:
    layer, (x, y) = nn.Linear(5, 4001), _data(1, 5)
    calibration = _calibration(layer, x.float(), y)
    with pytest.raises(ArgumentError, match=r"at most 20000 .* got 20005: pass probes=64"):
        hessian_diagonal(calibration)
    assert hessian_diagonal(calibration, probes=1)["weight"].any()


def test_refuses_impossible_probes_and_data_that_is_not_finite() -> None:
    model, (x, y) = _mlp(), _data(4, 5)
    with pytest.raises(ArgumentError, match="probes"):
        hessian_diagonal(_calibration(model, x, y), probes=0)
    with pytest.raises(ArgumentTypeError, match="probes"):
        hessian_diagonal(_calibration(model, x, y), probes=1.5)  # type: ignore[arg-type]
    x[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"0\.weight"):
        hessian_diagonal(_calibration(model, x, y))
