"""What the table says about each kind holds for its layers, and all parts of the library ask it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers.pytorch_utils import Conv1D

from tests.references.layer_curvature import empirical_diagonal
from torchprune_bayes import Calibration, LayerCurvature, prunable_parameters, prune_global
from torchprune_bayes.costs import flop_counter, flops_per_weight
from torchprune_bayes.gates.site import entries_of, weight_dim
from torchprune_bayes.layer_kinds import (
    LayerKind,
    SampleGradients,
    Side,
    kind_of,
    register_kind,
    registered_kinds,
    unregister_kind,
)
from torchprune_bayes.layer_kinds.gradients import DenseGradients
from torchprune_bayes.structured._layer_inputs import rows_of
from torchprune_bayes.structured._layer_sizes import layer_sizes

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 6), (2, 4)),
    "linear on tokens": (nn.Linear(4, 6), (2, 5, 4)),
    "conv1d of transformers": (Conv1D(6, 4), (2, 5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 3, 3)),
    "batch norm": (nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "group norm": (nn.GroupNorm(2, 4), (2, 4, 3, 3)),
    "layer norm": (nn.LayerNorm(4), (2, 5, 4)),
    "rms norm": (nn.RMSNorm(4), (2, 5, 4)),
    "slopes": (nn.PReLU(4), (2, 4, 3, 3)),
}
WEIGHTED = [name for name, (layer, _) in LAYERS.items() if kind_of(layer).prunable]
MATRICES = [name for name in WEIGHTED if kind_of(LAYERS[name][0]).is_matrix(LAYERS[name][0])]


def _case(name: str) -> tuple[Any, Tensor]:
    layer, shape = LAYERS[name]
    return layer.double().eval(), torch.rand(shape, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("name", WEIGHTED)
def test_dimensions_are_those_of_inputs_and_outputs(name: str) -> None:
    layer, x = _case(name)
    kind, before = kind_of(layer), layer.weight.detach().clone()
    plain = layer(x).detach()
    units = kind.units_dim
    groups = getattr(layer, "groups", 1)
    with torch.no_grad():
        layer.weight.select(kind.output_dim, 0).zero_()
        changed = (layer(x) != plain).movedim(units, 0).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [0]
        layer.weight.copy_(before)
        if groups == 1:
            layer.weight.select(kind.input_dim, 0).zero_()
            moved = x.clone()
            moved.select(units, 0).add_(1.0)
            torch.testing.assert_close(layer(moved), layer(x))
        layer.weight.copy_(before)


@pytest.mark.parametrize("name", WEIGHTED)
def test_costs_are_those_of_the_flop_counter(name: str) -> None:
    layer, x = _case(name)
    with torch.no_grad(), flop_counter() as counter:
        output = layer(x)
    uses = kind_of(layer).uses(layer, "weight", [x], output)
    assert uses is not None
    assert 2 * uses * layer.weight.numel() == counter.get_total_flops()


@pytest.mark.parametrize("name", MATRICES)
def test_a_layer_is_its_matrix_times_rows(name: str) -> None:
    layer, x = _case(name)
    kind = kind_of(layer)
    matrix = kind.as_matrix(layer.weight.detach())
    torch.testing.assert_close(kind.as_weight(matrix, layer.weight), layer.weight.detach())
    rows = torch.cat(list(rows_of(layer, x, 10**6, torch.Generator())))
    found = linear(rows, matrix, layer.bias)
    expected = layer(x).movedim(kind.units_dim, -1).reshape(-1, len(matrix))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_sizes_are_what_the_layer_notes_down(name: str) -> None:
    layer, _ = _case(name)
    tensors = {**layer._parameters, **layer._buffers}
    found = layer_sizes("layer", layer, {n: t for n, t in tensors.items() if t is not None})
    assert found
    assert {key: getattr(layer, key) for key in found} == found


@pytest.mark.parametrize("name", LAYERS)
def test_gates_scale_what_they_are_folded_into(name: str) -> None:
    layer, x = _case(name)
    units = kind_of(layer).units_dim
    for side in ("out", "in"):
        entries = entries_of(layer, side)
        if entries is None:
            continue
        shown = layer(x) if side == "out" else x
        assert shown.shape[units] == entries
        if layer.weight.ndim > 1:
            assert layer.weight.shape[weight_dim(layer, side)] == entries


class Scale(nn.Module):
    """A layer of the user's own: every input times a weight."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, units).unsqueeze(0))
        self.width = units

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaleKind(LayerKind):
    prunable = ("scale",)
    names = ("scale",)
    units_dim = -1
    input_dim = 1

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Scale)

    def uses(self, module: Any, name: str, inputs: Any, output: Any) -> float | None:
        return output.numel() / module.width

    def gate_entries(self, module: Any, side: Side) -> int | None:
        return int(module.width)

    def sizes(self, name: str, module: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"width": tensors["scale"].shape[1]}

    def has_gradients(self, module: nn.Module) -> bool:
        return True

    def gradients(
        self, module: nn.Module, saved: Any, g: Tensor, samples: int
    ) -> Mapping[str, SampleGradients]:
        return {"scale": DenseGradients((g * saved).reshape(samples, -1, 1, g.shape[-1]).sum(1))}


@pytest.fixture
def scale_kind() -> Iterator[LayerKind]:
    kind = register_kind(ScaleKind())
    yield kind
    unregister_kind(kind)


def test_one_registration_reaches_every_part(scale_kind: LayerKind) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Scale(4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    assert [name for _, name in prunable_parameters(model)] == ["scale", "weight"]
    calibration = Calibration(model, [(x, y)], cross_entropy)
    assert flops_per_weight(calibration) == {"0.scale": 2.0, "2.weight": 2.0}
    found = LayerCurvature().fit(calibration)
    assert found.coverage["0.scale"] == "Scale"
    expected = empirical_diagonal(model, [(x, y)], cross_entropy, calibration.pairs())
    torch.testing.assert_close(found.diagonal(), expected)
    assert entries_of(model[0], "out") == 4
    assert layer_sizes("0", model[0], {"scale": torch.zeros(1, 2)}) == {"width": 2}
    masks = prune_global(None, "woodfisher", calibration=calibration, pattern="2:4").masks
    assert masks["0.scale"].sum() == 2


def test_registered_kinds_are_asked_in_order(scale_kind: LayerKind) -> None:
    assert registered_kinds()[0] is scale_kind
    assert kind_of(Scale(2)) is scale_kind
    unknown = kind_of(nn.ReLU())
    assert not unknown.prunable
    assert not unknown.has_gradients(nn.ReLU())
    assert unknown not in registered_kinds()
