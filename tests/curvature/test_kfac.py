from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, unfold
from torch.nn.utils import prune

from tests.references.second_order import gradients_one_by_one
from torchprune_bayes import Calibration, LayerCurvature
from torchprune_bayes.errors import AlignmentError, CalibrationError, ParameterError


def _mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def _labels(samples: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(1))


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _fit(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> LayerCurvature:
    return _kronecker().fit(Calibration(model, [(x, y)], cross_entropy, **options))


def _kronecker() -> LayerCurvature:
    return LayerCurvature(structure="kronecker")


def _factors_use_by_use(model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Samples one by one, positions one by one: the definition, with one backward pass each."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    outer_a: Any = 0
    outer_g: Any = 0
    for n in range(len(x)):
        seen.clear()
        loss = cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        ((inputs, outputs),) = seen
        (gradient,) = torch.autograd.grad(loss, outputs)
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            patches = unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            a, g = patches[0].mT, gradient[0].flatten(1).mT
        else:
            a, g = inputs.flatten(0, -2), gradient.flatten(0, -2)
        positions = len(a)
        outer_a += sum(torch.outer(v, v) for v in a) / positions / len(x)
        outer_g += sum(torch.outer(v, v) for v in g) / len(x)
    handle.remove()
    return [outer_g.detach(), outer_a.detach()]


def _assert_equal_factors(found: LayerCurvature, name: str, expected: list[Tensor]) -> None:
    torch.testing.assert_close(list(found.factors(name)), expected)


def test_factors_of_linear_layers_are_the_definition() -> None:
    model, x, y = _mlp(), _normal(100, 5), _labels(100)
    factors = _fit(model, x, y)
    for name, layer in (("0.weight", model[0]), ("2.weight", model[2])):
        _assert_equal_factors(factors, name, _factors_use_by_use(model, layer, x, y))
    assert factors.count == 100


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": (2, 1)},
        {"kernel_size": (2, 3), "bias": False},
    ],
)
def test_factors_of_convolutions_are_the_definition(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, **{"kernel_size": 3, **options})
    # The ReLU overwrites the convolution's output, of which the gradient is wanted.
    model = nn.Sequential(conv, nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = _normal(6, 2, 7, 8), _labels(6)
    model(x)
    twin = copy.deepcopy(model)
    twin[1] = nn.ReLU()
    conv_twin = twin[0]
    expected = _factors_use_by_use(twin, conv_twin, x, y)
    _assert_equal_factors(_fit(model, x, y), "0.weight", expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_padding_by_name_and_mode_is_that_of_the_layer(mode: Any) -> None:
    conv = nn.Conv2d(1, 2, (4, 3), padding="same", padding_mode=mode).double()
    x = _normal(3, 1, 6, 5)
    calibration = Calibration(conv, [(x, x)], lambda output, target: output.square().mean())
    found = _kronecker().fit(calibration).factors("weight")[1]
    # With weights that pick one pixel of the patch each, a convolution lays the patches out.
    picks = nn.Conv2d(1, 12, (4, 3), padding="same", padding_mode=mode, bias=False).double()
    with torch.no_grad():
        picks.weight.copy_(torch.eye(12).reshape(12, 1, 4, 3))
        patches = picks(x).movedim(1, -1).reshape(-1, 12)
    torch.testing.assert_close(found, patches.mT @ patches / 3 / 30)


class _Tokens(nn.Module):
    """A linear layer on tokens, sequence first, whose outputs are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.layer(x.transpose(0, 1)).tanh()
        return tokens.mean(0)


def test_tokens_are_positions_wherever_the_batch_dimension_is() -> None:
    torch.manual_seed(0)
    model, x, y = _Tokens().double(), _normal(6, 4, 5), _labels(6)
    expected = _factors_use_by_use(model, model.layer, x, y)
    _assert_equal_factors(_fit(model, x, y), "layer.weight", expected)


class _Twice(nn.Module):
    """One layer called for each of two halves of the tokens, instead of once for all."""

    def __init__(self, tokens: _Tokens) -> None:
        super().__init__()
        self.layer = tokens.layer

    def forward(self, x: Tensor) -> Tensor:
        halves = [self.layer(half).tanh() for half in x.chunk(2, 1)]
        return torch.cat(halves, 1).mean(1)


def test_a_layer_called_twice_sees_positions_twice() -> None:
    torch.manual_seed(0)
    tokens, x, y = _Tokens().double(), _normal(6, 4, 5), _labels(6)
    once, twice = _fit(tokens, x, y), _fit(_Twice(tokens), x, y)
    _assert_equal_factors(twice, "layer.weight", list(once.factors("layer.weight")))


def test_conv1d_of_transformers_is_a_transposed_linear_layer() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    conv = pytorch_utils.Conv1D(4, 5)
    model: Any = nn.Sequential(conv, nn.Tanh(), nn.Linear(4, 3)).double()
    twin = copy.deepcopy(model)
    twin[0] = nn.Linear(5, 4).double()
    with torch.no_grad():
        twin[0].weight.copy_(conv.weight.mT)
        twin[0].bias.copy_(conv.bias)
    x, y = _normal(10, 5), _labels(10)
    outputs, inputs = _fit(twin, x, y).factors("0.weight")
    _assert_equal_factors(_fit(model, x, y), "0.weight", [inputs, outputs])


def test_the_product_is_the_exact_fisher_of_a_single_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3, 4)).double()
    x, y = _normal(1, 2, 3, 3), _labels(1)
    factors = _fit(model, x, y)
    rows = gradients_one_by_one(model, ["0.weight", "3.weight"], x, y, cross_entropy)
    for name, gradient in rows.items():
        exact = torch.outer(gradient.flatten(), gradient.flatten())
        torch.testing.assert_close(torch.kron(*factors.factors(name)), exact)


def test_the_product_is_the_exact_fisher_where_inputs_and_gradients_are_independent() -> None:
    layer = nn.Linear(2, 1, bias=False).double()
    # Every input meets every target, and the gradient depends on the target alone.
    inputs, targets = torch.eye(2).double(), torch.tensor([[1.0], [3.0]]).double()
    x, y = inputs.repeat_interleave(2, 0), targets.repeat(2, 1)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).mean()

    calibration = Calibration(layer, [(x, y)], loss_fn)
    product = torch.kron(*_kronecker().fit(calibration).factors("weight"))
    rows = gradients_one_by_one(layer, ["weight"], x, y, loss_fn)["weight"].flatten(1)
    torch.testing.assert_close(product, rows.mT @ rows / 4)


def test_labels_of_the_true_fisher_are_drawn_from_the_model() -> None:
    model, x = _mlp(), _normal(2000, 5)
    sampled = _fit(model, x, torch.zeros(2000, dtype=torch.long), fisher="true", seed=3)
    logits = model(x).detach()
    # E[ggᵀ] of the logits under the model's own distribution, in closed form.
    p = logits.softmax(-1)
    exact = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    found = sampled.factors("2.weight")[0]
    assert (found - exact).abs().max() < 0.03
    again = _fit(model, x, torch.zeros(2000, dtype=torch.long), fisher="true", seed=3)
    _assert_equal_factors(again, "2.weight", list(sampled.factors("2.weight")))


def test_are_taken_at_given_weights() -> None:
    model, x, y = _mlp(), _normal(10, 5), _labels(10)
    new = {"0.weight": torch.ones(4, 5), "2.weight": torch.full((3, 4), 0.5)}
    calibration = Calibration(model, [(x, y)], cross_entropy)
    factors = _kronecker().fit(calibration, new)
    with torch.no_grad():
        model[0].weight.copy_(new["0.weight"])
        model[2].weight.copy_(new["2.weight"])
    _assert_equal_factors(factors, "2.weight", _factors_use_by_use(model, model[2], x, y))


def test_work_without_gradients_around_and_on_pruned_models_in_training_mode() -> None:
    model, x, y = _mlp(), _normal(10, 5), _labels(10)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model.insert(1, nn.Dropout(0.5))
    expected = _factors_use_by_use(model.eval(), model[0], x, y)
    with torch.no_grad():
        factors = _fit(model.train(), x, y)
    _assert_equal_factors(factors, "0.weight", expected)
    assert model.training


def test_leave_no_hooks_even_when_the_loss_fails() -> None:
    model, x, y = _mlp(), _normal(10, 5), _labels(10)

    def failing(output: Tensor, target: Tensor) -> Tensor:
        raise OSError("no loss today")

    with pytest.raises(OSError, match="no loss today"):
        _kronecker().fit(Calibration(model, [(x, y)], failing))
    _fit(model, x, y)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_is_not_reached_has_a_curvature_of_zero() -> None:
    model = _mlp()
    model.add_module("unused", nn.Identity())
    model.unused.layer = nn.Linear(2, 2).double()
    factors = _fit(model, _normal(4, 5), _labels(4))
    assert not factors.block_diagonal("unused.layer.weight").any()
    inverse = factors.inverse("unused.layer.weight", damping=0.5)
    torch.testing.assert_close(inverse.diagonal(), torch.full((2, 2), 2.0).double())


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 1, groups=2), nn.ConvTranspose2d(4, 4, 1)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_without_kronecker_factors_have_a_diagonal(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(36, 3)).double()
    x, y = _normal(2, 4, 3, 3), _labels(2)
    found = _fit(model, x, y)
    assert found.kronecker_names == ["2.weight"]
    with pytest.raises(ParameterError, match=r"got '0\.weight'; there are 2\.weight"):
        found.factors("0.weight")
    rows = gradients_one_by_one(model, ["0.weight"], x, y, cross_entropy)["0.weight"]
    diagonal = rows.square().mean(0)
    torch.testing.assert_close(found.block_diagonal("0.weight"), diagonal)
    inverse = found.inverse("0.weight", damping=0.1)
    expected = (diagonal + 0.1).reciprocal().flatten(1)
    torch.testing.assert_close(inverse.diagonal(), expected)
    torch.testing.assert_close(inverse.solve(torch.ones_like(expected)), expected)


def test_biases_have_the_factor_of_the_outputs() -> None:
    model, x, y = _mlp(), _normal(4, 5), _labels(4)
    both = _fit(model, x, y, params=[(model[0], "weight"), (model[0], "bias")])
    outputs, one = both.factors("0.bias")
    torch.testing.assert_close(outputs, both.output_factor("0.weight"))
    assert one.tolist() == [[1.0]]


def test_the_mean_is_that_of_the_remaining_entries() -> None:
    model, x, y = _mlp(), _normal(12, 5), _labels(12)
    prune.l1_unstructured(model[0], "weight", 0.5)
    found = LayerCurvature(structure="kronecker", factor_limit=4)
    found = found.fit(Calibration(model, [(x, y)], cross_entropy))
    assert found.kronecker_names == ["2.weight"]
    kept = model[0].weight_mask.bool()
    entries = [found.diagonal()["0.weight"][kept], found.block_diagonal("2.weight").flatten()]
    assert found.mean() == pytest.approx(float(torch.cat(entries).mean()))


def test_refuses_data_that_is_not_finite() -> None:
    x = _normal(4, 5)
    x[1, 2] = float("nan")
    with pytest.raises(CalibrationError, match=r"0\.weight, 2\.weight"):
        _fit(_mlp(), x, _labels(4))


def test_merged_halves_equal_the_whole() -> None:
    model, x, y = _mlp(), _normal(20, 5), _labels(20)
    merged = _fit(model, x[:5], y[:5]).merge(_fit(model, x[5:], y[5:]))
    _assert_equal_factors(merged, "0.weight", list(_fit(model, x, y).factors("0.weight")))


def test_survive_saving_and_loading(tmp_path: Path) -> None:
    factors = _fit(_mlp(), _normal(10, 5), _labels(10))
    factors.save(tmp_path / "factors.safetensors")
    loaded = LayerCurvature.load(tmp_path / "factors.safetensors")
    _assert_equal_factors(loaded, "2.weight", list(factors.factors("2.weight")))
    loaded.check_fitted_to(factors.masks)
    with pytest.raises(AlignmentError, match="no such tensor"):
        loaded.check_fitted_to({"3.weight": torch.ones(1).bool()})
