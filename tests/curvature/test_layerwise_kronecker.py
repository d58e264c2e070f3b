from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from tests.references.layer_curvature import ggn, split
from torchprune_bayes.curvature import LayerCurvature
from torchprune_bayes.errors import ParameterError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports is deprecated in torch
    from curvlinops import KFACLinearOperator  # type: ignore[import-untyped]


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _gaussian(f: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (f - y).square().sum(1).mean()


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _convnet() -> nn.Module:
    convolutions = [nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, stride=2)]
    return nn.Sequential(*convolutions, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3, bias=False))


def _wide() -> nn.Module:
    convolutions = [nn.Conv2d(2, 16, 1), nn.Tanh(), nn.Conv2d(16, 2, 3, padding=1)]
    return nn.Sequential(*convolutions, nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), Mean())


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (_mlp, _normal(8, 4)),
    "convnet": (_convnet, _normal(8, 2, 5, 5)),
    "wide": (_wide, _normal(8, 2, 3, 3)),
    "tokens": (_tokens, _normal(8, 6, 4)),
}


def _case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, x = MODELS[name]
    return make().double(), x, torch.arange(len(x)) % 3


def _block(found: LayerCurvature, name: str) -> Tensor:
    return torch.kron(*found.factors(name))


@pytest.mark.parametrize(("kind", "theirs"), [("empirical", "empirical"), ("ggn", "type-2")])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_those_of_curvlinops(name: str, kind: Any, theirs: str) -> None:
    model, x, y = _case(name)
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    found = LayerCurvature(kind, "kronecker").fit_model(model, data, cross_entropy)
    parameters = list(model.parameters())
    operator = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, data, fisher_type=theirs, kfac_approx="expand"
    )
    dense = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    start = 0
    for key, parameter in model.named_parameters():
        stop = start + parameter.numel()
        torch.testing.assert_close(
            _block(found, key), dense[start:stop, start:stop], rtol=1e-9, atol=1e-13
        )
        start = stop
    assert found.diagonal() == {}


@pytest.mark.parametrize("kind", ["empirical", "ggn"])
def test_linear_layer_with_one_input_is_exact(kind: Any) -> None:
    """With the same input for all samples the two factors are independent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = _normal(1, 4).expand(6, 4), torch.arange(6) % 3
    found = LayerCurvature(kind, "both").fit_model(model, [(x, y)], cross_entropy)
    for key, diagonal in found.diagonal().items():
        block = _block(found, key).diagonal().view_as(diagonal)
        torch.testing.assert_close(block, diagonal, rtol=1e-10, atol=1e-16)
    if kind == "ggn":
        exact = ggn(model, x, y, cross_entropy)
        torch.testing.assert_close(_block(found, "0.weight"), exact[:12, :12])
        torch.testing.assert_close(_block(found, "0.bias"), exact[12:, 12:])


def test_deep_linear_network_with_gaussian_likelihood_is_exact() -> None:
    """The second derivative of the loss and all Jacobians are then constants."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    x, y = _normal(9, 4), _normal(9, 3)
    found = LayerCurvature("ggn", "both").fit_model(
        model, [(x[:2], y[:2]), (x[2:], y[2:])], _gaussian
    )
    exact = ggn(model, x, y, _gaussian)
    diagonal = split(exact.diagonal(), model)
    start = 0
    for key, parameter in model.named_parameters():
        stop = start + parameter.numel()
        torch.testing.assert_close(
            _block(found, key), exact[start:stop, start:stop], rtol=1e-10, atol=1e-13
        )
        torch.testing.assert_close(found.diagonal()[key], diagonal[key], rtol=1e-10, atol=1e-15)
        start = stop


def test_hugging_face_s_layout_is_transposed() -> None:
    torch.manual_seed(0)
    layer = Conv1D(3, 4).double()
    plain = nn.Linear(4, 3).double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight.T)
        plain.bias.copy_(layer.bias)
    x, y = _normal(6, 5, 4), torch.arange(6) % 3
    fits = [
        LayerCurvature(structure="kronecker").fit_model(
            nn.Sequential(module, Mean()), [(x, y)], cross_entropy
        )
        for module in (layer, plain)
    ]
    rows, columns = fits[0].factors("0.weight")
    outputs, inputs = fits[1].factors("0.weight")
    torch.testing.assert_close(rows, inputs)
    torch.testing.assert_close(columns, outputs)
    torch.testing.assert_close(fits[0].factors("0.bias"), fits[1].factors("0.bias"))


def test_the_split_into_batches_does_not_matter() -> None:
    model, x, y = _case("convnet")
    one = LayerCurvature("ggn", "both").fit_model(model, [(x, y)], cross_entropy)
    many = LayerCurvature("ggn", "both", batch_size=3)
    many = many.fit_model(model, [(x[:1], y[:1]), (x[1:], y[1:])], cross_entropy)
    assert one.sums.keys() == many.sums.keys()
    for key, value in one.sums.items():
        torch.testing.assert_close(many.sums[key], value, rtol=1e-10, atol=1e-13)


def test_layers_without_factors_have_a_diagonal() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.norm = nn.BatchNorm2d(4)
            self.wide = nn.Linear(36, 7)
            self.head = nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.wide(self.norm(self.depthwise(x)).flatten(1)).tanh())

    torch.manual_seed(0)
    model, x = Mixed().double(), _normal(6, 4, 5, 5)
    data = [(x, torch.arange(6) % 3)]
    found = LayerCurvature(structure="kronecker", factor_limit=30)
    found = found.fit_model(model, data, cross_entropy)
    assert found.kronecker_names == ["head.weight", "head.bias"]
    assert found.diagonal().keys() == found.masks.keys() - {"head.weight", "head.bias"}
    exact = LayerCurvature().fit_model(model, data, cross_entropy).diagonal()
    for key, value in found.diagonal().items():
        torch.testing.assert_close(value, exact[key], rtol=1e-12, atol=0)
    with pytest.raises(ParameterError, match="Expected a parameter with Kronecker factors"):
        found.factors("wide.weight")


def test_a_layer_used_twice_adds_up_its_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.fc(x)))

    class Copies(nn.Module):
        def __init__(self, fc: nn.Module) -> None:
            super().__init__()
            self.first, self.second = fc, copy.deepcopy(fc)

        def forward(self, x: Tensor) -> Any:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    twice = Twice().double()
    data = [(_normal(6, 4), torch.arange(6) % 4)]
    found = LayerCurvature(structure="kronecker").fit_model(twice, data, cross_entropy)
    apart = LayerCurvature(structure="kronecker")
    apart = apart.fit_model(Copies(twice.fc), data, cross_entropy)
    first, second = (apart.factors(f"{part}.weight") for part in ("first", "second"))
    outputs, inputs = found.factors("fc.weight")
    torch.testing.assert_close(outputs, first[0] + second[0])
    torch.testing.assert_close(inputs, (first[1] + second[1]) / 2)
